"""Optimisers: Muon for small worlds, and optimisers whose state exists before their first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["Muon", "primed"]

# of an odd quintic that takes singular values to about 1 in 5 steps
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315
LEAST_SIDE, MOST_RATIO = 32, 16  # of a matrix that is orthogonalised: tables and thin projections are not


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices, AdamW for everything else.

    The momentum of a matrix is orthogonalised, so that every direction learns at one rate; its update is
    scaled to the root mean square that AdamW's has (Liu et al., 2025), so that both take the same learning
    rate. Matrices of one shape are orthogonalised together, where torch's own Muon, which takes nothing but
    matrices, would launch kernels for each: small networks have many small ones. A matrix is a parameter of
    two dimensions with sides of at least 32, one at most 16 times the other.

    Args:
        params: Parameters, not sharded.
        lr: Learning rate of both.
        momentum: Decay of the momentum of matrices (Nesterov's).
        betas: Decays of AdamW's means.
        eps: Added to AdamW's root.
        weight_decay: Decoupled weight decay of both.

    Raises:
        ValueError: If a number is out of range, or a parameter is sharded.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        params = list(params)
        if not all(isinstance(p, Tensor) for p in params):
            raise ValueError("Muon takes parameters, not groups or names of them; it makes its own groups.")
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr} and weight_decay={weight_decay} must not be negative.")
        for name, decay in {"momentum": momentum, "betas[0]": betas[0], "betas[1]": betas[1]}.items():
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"{name}={decay} must be in [0, 1).")
        if any(isinstance(p, DTensor) for p in params):
            raise ValueError(
                "Muon orthogonalises whole matrices, and these are sharded: take AdamW, or strategy ddp."
            )
        matrices = [p for p in params if _is_matrix(p)]
        rest = [p for p in params if not _is_matrix(p)]
        groups = [{"params": matrices, "orthogonal": True}, {"params": rest, "orthogonal": False}]
        settings = {
            "lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__([group for group in groups if group["params"]], settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                (self._step_matrices if group["orthogonal"] else self._step_rest)(params, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `Muon`.

        Raises:
            ValueError: If it is another optimiser's.
        """
        if not all("orthogonal" in group for group in state_dict["param_groups"]):
            raise ValueError(
                "The checkpoint holds the state of another optimiser than Muon; go on with that one, or "
                "start anew from the exported weights (init.path)."
            )
        super().load_state_dict(state_dict)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        means = [self._state(p, "momentum") for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, means, group["momentum"])
        alike: dict[tuple[torch.Size, torch.device], list[int]] = {}
        for i, p in enumerate(params):
            alike.setdefault((p.shape, p.device), []).append(i)
        for (shape, _), places in alike.items():
            updates = orthogonalized(torch.stack([ahead[i] for i in places]))
            size = -group["lr"] * 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(
                [params[i] for i in places], [u.to(params[places[0]].dtype) for u in updates], alpha=size
            )

    def _step_rest(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        first = [self._state(p, "exp_avg") for p in params]
        second = [self._state(p, "exp_avg_sq") for p in params]
        steps = [self._count(p) for p in params]
        b1, b2 = group["betas"]
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - b2)
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [math.sqrt(1 - b2**n) for n in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, first, roots, [-group["lr"] / (1 - b1**n) for n in steps])

    def _state(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        kept: Tensor = state[name]
        return kept

    def _count(self, p: Tensor) -> int:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        return int(state["step"])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices (n, r, c) with their singular values taken to about 1 (0.7 to 1.2): five
    Newton-Schulz steps, in bfloat16 on a GPU and under autocast.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _is_matrix(p: Tensor) -> bool:
    return p.ndim == 2 and min(p.shape) >= LEAST_SIDE and max(p.shape) <= MOST_RATIO * min(p.shape)


@torch.no_grad()
def primed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give a fresh optimiser its state, all zeros, weights untouched; return it.

    Reading the state of an optimiser without one, torch's distributed checkpoints have it take a step with a
    gradient of zero, which counts in Adam's bias corrections: saving would change the run. Of an optimiser
    that waits for its first step while another one trains, that is no rare case.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    return optimizer
