"""What is learned: a DiT and, in small worlds, its word table, joined to one function of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn

from relic.nn.context import Context, Fresh, Prompt
from relic.nn.dit import DiT, DiTConfig
from relic.nn.text import WordTable, WordTableConfig
from relic.ops.flow import euler_step, guide, sigma_schedule, steps_to
from relic.types import Controls

__all__ = ["Denoiser", "EulerSampler"]


class Denoiser(nn.Module):
    """Predict velocity given prompts as word ids (b, n) int64 or as embeddings (b, n, d)."""

    def __init__(self, dit: DiTConfig, words: WordTableConfig | None = None) -> None:
        super().__init__()
        if words is not None and words.width != dit.text_width:
            raise ValueError(f"words.width={words.width} must equal the DiT's text_width={dit.text_width}.")
        self.dit = DiT(dit)
        self.words = WordTable(words) if words else None

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        self.dit.reset_parameters()
        if self.words is not None:
            self.words.reset_parameters()

    def embed(self, text: Tensor, *, drop: Tensor | None = None) -> Tensor:
        """Return prompt embeddings (b, n, d); samples marked in `drop` (b,) bool get an empty prompt (zero
        rows).
        """
        if not text.is_floating_point():
            if self.words is None:
                raise ValueError("The batch holds word ids, but this network has no word table: set `words`.")
            text = self.words(text)
        return text if drop is None else text * ~drop[:, None, None]

    def read(self, text: Tensor) -> Prompt:
        """Return a prompt as blocks read it, to be passed as `text` for as long as it does not change."""
        return self.dit.read(self.embed(text))

    @overload
    def forward(
        self, latents: Tensor, *, sigma: Tensor, text: Tensor | Prompt, controls: Controls | None,
        drop_text: Tensor | None = None, memory: None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, latents: Tensor, *, sigma: Tensor, text: Tensor | Prompt, controls: Controls | None,
        drop_text: Tensor | None = None, memory: Context,
    ) -> tuple[Tensor, Fresh]: ...  # fmt: skip

    def forward(
        self,
        latents: Tensor,
        *,
        sigma: Tensor,
        text: Tensor | Prompt,
        controls: Controls | None,
        drop_text: Tensor | None = None,
        memory: Context | None = None,
    ) -> Tensor | tuple[Tensor, Fresh]:
        """Return the velocity of latents (b, t, c, h, w) at noise levels sigma (b, t); with a memory, also
        the fresh keys and values (see `DiT.forward`).
        """
        if isinstance(text, Prompt):
            if drop_text is not None:
                raise ValueError(
                    "drop_text empties embeddings; this prompt was read already, so read another."
                )
        else:
            text = self.embed(text, drop=drop_text)
        if memory is None:
            return self.dit(latents, sigma=sigma, text=text, controls=controls)
        return self.dit(latents, sigma=sigma, text=text, controls=controls, memory=memory)

    @contextmanager
    def at_rope_factor(self, factor: float) -> Iterator[None]:
        """Let the network run at another YaRN factor for a while."""
        own = self.dit.config
        self.dit.config = replace(own, rope_factor=factor)
        try:
            yield
        finally:
            self.dit.config = own


@dataclass(frozen=True, kw_only=True)
class EulerSampler:
    """Solve the flow ODE of a bidirectional network with what is given of the clip kept clean.

    Args:
        steps: Euler steps.
        shift: Warp of the noise levels towards noise (5 for Wan2.1 at 480x832; near 1 for a small world).
        guidance: Classifier-free guidance on the text; 1 means none.
    """

    steps: int = 48
    shift: float = 5.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if self.shift < 1.0:
            raise ValueError(f"shift={self.shift} must be at least 1 (none).")

    def states(
        self, net: Denoiser, noise: Tensor, *, given: Tensor, text: Tensor, controls: Controls | None
    ) -> Iterator[Tensor]:
        """Yield the states (b, t, c, h, w) of the solution after each step; the last one is clean.

        noise: (b, t, c, h, w); given: (b, n, c, h, w), the clean first latents, at sigma 0 throughout (paper
            §4.1: the image alone).
        """
        xt = torch.cat([given, noise[:, given.shape[1] :]], dim=1)
        moving = noise.new_ones(noise.shape[:2], dtype=torch.promote_types(noise.dtype, torch.float32))
        moving[:, : given.shape[1]] = 0.0
        levels = sigma_schedule(self.steps, shift=self.shift).tolist()
        dropped = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        for level, next_level in pairwise(levels):
            sigma = level * moving
            velocity = net(xt, sigma=sigma, text=text, controls=controls)
            if self.guidance != 1.0:
                plain = net(xt, sigma=sigma, text=text, controls=controls, drop_text=dropped)
                velocity = guide(velocity, plain, scale=self.guidance)
            xt = euler_step(xt, velocity, sigma=sigma, next_sigma=next_level * moving)
            yield xt

    def trajectory(
        self,
        net: Denoiser,
        noise: Tensor,
        *,
        levels: Sequence[float],
        given: Tensor,
        text: Tensor,
        controls: Controls | None,
    ) -> Tensor:
        """Return the states of a solution at noise levels, from 1 down, and its clean end, (b, s, t, c, h,
        w), s one more than levels. The other arguments are those of `states`.

        Raises:
            ValueError: If the steps pass a level by, with numbers of steps that would not.
        """
        wanted = {*steps_to(levels, steps=self.steps, shift=self.shift), self.steps}
        kept = [torch.cat([given, noise[:, given.shape[1] :]], dim=1)] if 0 in wanted else []
        states = self.states(net, noise, given=given, text=text, controls=controls)
        kept += [state for number, state in enumerate(states, 1) if number in wanted]
        return torch.stack(kept, dim=1)

    def __call__(
        self, net: Denoiser, noise: Tensor, *, given: Tensor, text: Tensor, controls: Controls | None
    ) -> Tensor:
        """Return the clean end state."""
        *_, x0 = self.states(net, noise, given=given, text=text, controls=controls)
        return x0
