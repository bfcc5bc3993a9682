"""What recorded training is tested with where there is no GPU to record on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relic.parallel import Recorder


class AsItIs(Recorder):
    """Runs functions as they are, and holds them to what a recording takes: tensors in nested tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._counted, function)

    def _counted(self, function: Callable[..., Any], inputs: Any, **settings: Any) -> Any:
        assert isinstance(inputs, tuple)
        assert all(isinstance(x, torch.Tensor) for x in tree_leaves(inputs))
        self.calls.append(function.__name__)
        return function(inputs, **settings)


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
