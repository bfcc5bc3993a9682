"""Put tensors where a network's parameters are: in memory, on the meta device, or sharded over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from relic.nn.tensor_files import Span, Tensors, TensorsInMemory

__all__ = ["fresh_values", "local_span", "place"]


@torch.no_grad()
def place(module: nn.Module, tensors: Tensors, *, device: torch.device | str | None = None) -> None:
    """Copy tensors, named as in the network's state, one by one into it; each is cast to its target's dtype.

    A target on the meta device gets memory on `device` (a sharded one on its mesh's device); of a sharded one
    each rank reads only its own part.

    Raises:
        ValueError: If a target on the meta device has no device to go to.
    """
    own = module.state_dict()
    assigned: dict[str, Tensor] = {}
    for name, read in tensors.stream():
        target = own[name]
        if target.is_meta:
            local = _with_memory(name, target, device=device)
            assigned[name] = _like(target, local)
        else:
            local = target.to_local() if isinstance(target, DTensor) else target
        local.copy_(read(local_span(target)))
    if assigned:
        module.load_state_dict(assigned, strict=False, assign=True)


def _with_memory(name: str, target: Tensor, *, device: torch.device | str | None) -> Tensor:
    if isinstance(target, DTensor):
        kind = target.device_mesh.device_type
        where = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        return torch.empty(target.to_local().shape, dtype=target.dtype, device=where)
    if device is None or torch.device(device).type == "meta":
        raise ValueError(f"{name} is on the meta device; say with device= where its memory shall be.")
    return torch.empty(target.shape, dtype=target.dtype, device=device)


def _like(target: Tensor, local: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return local
    return DTensor.from_local(
        local,
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def local_span(target: Tensor) -> Span | None:
    """Return the span of the whole tensor that this rank holds of `target`, or None if that is all of it.

    Raises:
        ValueError: If it is placed in another way than in equal rows (`Shard`) or whole (`Replicate`).
    """
    if not isinstance(target, DTensor):
        return None
    spans = [(0, size) for size in target.shape]
    for axis, placement in enumerate(target.placements):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard:  # a strided shard is a subclass
            raise ValueError(
                f"A parameter is placed as {placement}; weights are loaded into Shard and Replicate only. "
                "Load before that placement is applied."
            )
        start, stop = spans[placement.dim]
        rows = -(-(stop - start) // target.device_mesh.size(axis))
        first = min(start + rows * target.device_mesh.get_local_rank(axis), stop)
        spans[placement.dim] = (first, min(first + rows, stop))
    return tuple(slice(start, stop) for start, stop in spans)


def fresh_values(module: nn.Module, names: Collection[str]) -> Tensors:
    """Draw what `module.reset_parameters` would put into the named parameters; the network stays as it is.

    Values are drawn whole on the CPU, so that they depend on the seed and on neither device nor sharding.

    Raises:
        ValueError: If the network cannot initialise itself, or a name is not a parameter.
    """
    parameters = dict(module.named_parameters())
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{type(module).__name__} has no reset_parameters, so the {len(names)} parameters that the file "
            "lacks cannot be initialised on the meta device. Build it in memory, or give it that method."
        )
    if unknown := sorted(set(names) - parameters.keys()):
        raise ValueError(
            f"{', '.join(unknown)} are buffers, which have no initial draw; take them out of missing."
        )
    # all others stand aside on meta, where a draw costs nothing
    stand_ins = {
        name: nn.Parameter(
            torch.empty(p.shape, dtype=p.dtype, device="cpu" if name in names else "meta"),
            requires_grad=False,
        )
        for name, p in parameters.items()
    }
    with _swapped(module, stand_ins):
        reset()
    return TensorsInMemory({name: stand_ins[name].detach() for name in names})


@contextmanager
def _swapped(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    own: dict[str, nn.Parameter | None] = {}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        own[name] = owner._parameters[leaf]
        owner._parameters[leaf] = parameter
    try:
        yield
    finally:
        for name, original in own.items():
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = original
