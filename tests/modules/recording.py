"""What recorded training is tested with where there is no GPU to record on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relic.parallel import Recorder


class Emulated(Recorder):
    """Does what a recording would: it adds to the gradients that were there when it was made, wherever those
    of the parameters are now.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        super().__init__(parameters)
        self.calls: list[str] = []
        self.made: dict[object, list[torch.Tensor | None] | None] = {}

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._emulate, function)

    def _emulate(self, function: Callable[..., Any], inputs: Any, **settings: Any) -> Any:
        assert isinstance(inputs, tuple)
        tensors = tree_leaves(inputs)
        assert all(isinstance(x, torch.Tensor) for x in tensors)
        self.calls.append(function.__name__)
        key = function.__name__, tuple(settings.items()), tuple(x.shape for x in tensors)
        parameters = list(self.parameters())
        if key not in self.made:
            self.made[key] = None
            return function(inputs, **settings)
        now = [p.grad for p in parameters]
        made = self.made[key] = self.made[key] or now
        for parameter, grad in zip(parameters, made, strict=True):
            parameter.grad = grad
        results = function(inputs, **settings)
        for parameter, grad in zip(parameters, now, strict=True):
            parameter.grad = grad
        return results


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a tensor of the host meets one of the device, which no recording could repeat; an index
    that is a list is one too, though it does not show here.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.index.Tensor
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        hosted = [x for x in tensors if x.device.type != "meta" and x.ndim]
        assert not hosted or len(hosted) == len(tensors), f"{func} takes {len(hosted)} tensors from the host"
        return out
