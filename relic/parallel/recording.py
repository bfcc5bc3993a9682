"""CUDA graphs: work that is launched kernel by kernel at first, and as a whole from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Recorder"]


class Recorder:
    """Runs functions of tensors as CUDA graphs, one for each function and shapes.

    The first call runs a function as it is, so that kernels are chosen and compiled; the second one records
    it; from then on it is replayed. What it reads and writes besides its arguments (weights, gradients) must
    stay where it is: gradients are there after the first call, so set them to zero in place. It must not ask
    the device for a value, nor bring anything from the host. Results are overwritten by the next call.

    Args:
        parameters: Returns the parameters whose gradients the functions add to.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.parameters = parameters
        self._graphs: dict[Hashable, _Recording | None] = {}
        self._pool: Any = None  # recordings are replayed one at a time, so they share their memory
        self._stream: torch.cuda.Stream | None = None  # memory belongs to a stream, so it is always this one

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs `function(inputs, **settings)` through its recording.

        inputs: tensors on the device, in nested tuples; settings are part of what is recorded.
        """
        return partial(self._run, function)

    def _run(self, function: Callable[..., Any], inputs: Any, **settings: Hashable) -> Any:
        tensors = _tensors(inputs)
        hosted = sum(not x.is_cuda for x in tensors)
        if hosted:
            raise ValueError(f"{hosted} of {len(tensors)} inputs are not on a CUDA device; move them there.")
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        key = function.__qualname__, tuple(settings.items()), shapes
        if key not in self._graphs:
            self._graphs[key] = None
            return self._as_it_is(function, inputs, settings)
        recording = self._graphs[key]
        if recording is None:
            recording = self._graphs[key] = self._record(function, inputs, settings)
        places = zip(recording.gradients, self._gradients(), strict=True)
        moved = sum(before not in (None, now) for before, now in places)
        if moved:
            raise RuntimeError(
                f"{moved} gradients are not where they were when this was recorded: set them to zero in "
                "place, not to None."
            )
        torch._foreach_copy_(recording.inputs, tensors)
        recording.graph.replay()
        return recording.results

    def _as_it_is(self, function: Callable[..., Any], inputs: Any, settings: dict[str, Any]) -> Any:
        """Run on the stream of the recordings: autograd remembers the stream of a weight."""
        self._stream = stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = function(inputs, **settings)
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def _record(self, function: Callable[..., Any], inputs: Any, settings: dict[str, Any]) -> _Recording:
        held = _map(torch.clone, inputs)
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # weights must be cast in every replay
        # data is read in other threads meanwhile, whose calls are none of ours
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = function(held, **settings)
        torch.clear_autocast_cache()
        self._pool = graph.pool()
        return _Recording(graph, inputs=_tensors(held), results=results, gradients=self._gradients())

    def _gradients(self) -> list[int | None]:
        """Return where the gradients are."""
        return [None if p.grad is None else p.grad.data_ptr() for p in self.parameters()]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Any
    gradients: list[int | None]


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    parts = [_map(function, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [x for part in value for x in _tensors(part)]
