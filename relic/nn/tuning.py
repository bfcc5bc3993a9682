"""How a pretrained network takes to actions: which weights learn, and when. What is learned can always be
told as plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relic.nn.control import is_control
from relic.ops.randomness import derive_seed

__all__ = ["ControlFirst", "FullTuning", "LowRank", "Tuning"]

# every linear layer of a block's attention and feed-forward
ADAPTED = r".*blocks\.\d+\.((self_attn|cross_attn)\.[qkvo]|ffn\.[02])"


@dataclass(frozen=True, kw_only=True)
class FullTuning:
    """Train every weight from the first step."""

    def prepare(self, net: nn.Module, *, seed: int) -> None:
        """Leave the network as it is."""

    def trains(self, name: str, *, step: int) -> bool:
        """Return whether the parameter learns at optimiser step `step`."""
        return True

    def plain_weights(self, net: nn.Module) -> Mapping[str, Tensor]:
        """Return the weights under the names of the plain network."""
        return net.state_dict()


@dataclass(frozen=True, kw_only=True)
class ControlFirst(FullTuning):
    """Train the control layers alone for the first steps, then every weight.

    Args:
        control_steps: Optimiser steps in which only the control layers learn.

    Raises:
        ValueError: If there is no such step, or (when it is prepared) no control layer.
    """

    control_steps: int

    def __post_init__(self) -> None:
        if self.control_steps < 1:
            raise ValueError(
                f"control_steps={self.control_steps} must be at least 1; to train all weights from the start "
                "take FullTuning."
            )

    def prepare(self, net: nn.Module, *, seed: int) -> None:
        """Check that there is control to train."""
        if not any(is_control(name) for name, _ in net.named_parameters()):
            raise ValueError("ControlFirst needs a network with control layers: set net.control.")

    def trains(self, name: str, *, step: int) -> bool:
        """Return whether the parameter learns at optimiser step `step`."""
        return step >= self.control_steps or is_control(name)


@dataclass(frozen=True, kw_only=True)
class LowRank(FullTuning):
    """Train the control layers and, beside the frozen rest, an update of low rank (LoRA, with `peft`).

    Args:
        rank: Rank of the update of each attention and feed-forward layer.
        alpha: The update is scaled by alpha / rank.

    Raises:
        ValueError: If the rank or alpha is not positive.
        ImportError: When it is prepared, if `peft` is not installed.
    """

    rank: int
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank} must be at least 1 and alpha={self.alpha} above 0.")

    def prepare(self, net: nn.Module, *, seed: int) -> None:
        """Put the update, which starts at zero, beside each adapted layer, and freeze what it stands for."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("LowRank needs peft: pip install 'relic-world[peft]'.") from error
        # peft takes an int for alpha in its types only; the scale is a plain quotient
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=ADAPTED)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "low rank"))
            inject_adapter_in_model(config, net)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(self.trains(name, step=0))

    def trains(self, name: str, *, step: int) -> bool:
        """Return whether the parameter learns at optimiser step `step`."""
        return _is_update(name) or is_control(name)

    def plain_weights(self, net: nn.Module) -> Mapping[str, Tensor]:
        """Return the weights under the names of the plain network, the update added in."""
        from peft.tuners.lora import Linear

        updates = {
            f"{name}.weight": layer.get_delta_weight("default")
            for name, layer in net.named_modules()
            if isinstance(layer, Linear)
        }
        kept = {
            name.replace(".base_layer.", "."): value
            for name, value in net.state_dict().items()
            if not _is_update(name)
        }
        return {name: value + updates[name] if name in updates else value for name, value in kept.items()}


Tuning = FullTuning | ControlFirst | LowRank


def _is_update(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))
