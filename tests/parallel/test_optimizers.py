"""Muon: matrices as torch's own, everything else as AdamW, and a run goes on where it was."""

import copy

import pytest
import torch
from torch import nn

from relic.parallel import Muon
from relic.parallel.optimizers import orthogonalized

SETTINGS = {"lr": 1e-2, "weight_decay": 0.05}


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], *, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) + 0.5 * p.detach()
        optimizer.step()


def test_matrices_are_updated_as_by_torch():
    shapes = (48, 48), (48, 48), (96, 48), (48, 160)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    start = parameters(*shapes)
    run(Muon(ours, **SETTINGS), ours, steps=4)
    run(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS), theirs, steps=4)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.02 * (other - before).norm()  # theirs computes in bfloat16


def test_everything_else_is_updated_as_by_adamw():
    shapes = (48,), (16, 48), (2000, 48), (4, 4, 48)  # too thin, a table, no matrix
    ours, theirs = parameters(*shapes), parameters(*shapes)
    run(Muon(ours, betas=(0.8, 0.95), **SETTINGS), ours, steps=5)
    run(torch.optim.AdamW(theirs, betas=(0.8, 0.95), **SETTINGS), theirs, steps=5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


def test_singular_values_are_taken_to_about_one():
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 40, 72) ** 3))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_matrices_of_one_shape_do_not_touch_each_other():
    ours, alone = parameters((48, 48), (48, 48)), parameters((48, 48), (48, 48))
    for params in (ours, alone):
        for p, grad in zip(
            params, torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(3)), strict=True
        ):
            p.grad = grad
    Muon(ours, **SETTINGS).step()
    for p in alone:
        Muon([p], **SETTINGS).step()
    for mine, other in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped():
    shapes = (48, 64), (48,)
    whole, stopped = parameters(*shapes), parameters(*shapes)
    through, first = Muon(whole, **SETTINGS), Muon(stopped, **SETTINGS)
    run(through, whole, steps=3)
    run(first, stopped, steps=3)
    again = Muon(stopped, **SETTINGS)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    run(through, whole, steps=2, seed=7)
    run(again, stopped, steps=2, seed=7)
    assert all(map(torch.equal, whole, stopped))


def test_a_warm_up_reaches_both_kinds():
    shapes = (48, 48), (48,)
    ours, theirs = parameters(*shapes), parameters(*shapes)
    mine = Muon(ours, **SETTINGS)
    ramp = torch.optim.lr_scheduler.LambdaLR(mine, lambda step: 0.25 * (step + 1))
    others = [
        torch.optim.Muon(theirs[:1], adjust_lr_fn="match_rms_adamw", **SETTINGS),
        torch.optim.AdamW(theirs[1:], betas=(0.9, 0.95), **SETTINGS),
    ]
    ramps = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.25 * (step + 1)) for o in others]
    before = [p.detach().clone() for p in ours]
    for step in range(2):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for each in (mine, *others, ramp, *ramps):
            each.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()


def test_the_state_of_another_optimiser_and_groups_are_refused():
    params = parameters((48, 48), (48,))
    with pytest.raises(ValueError, match="another optimiser than Muon"):
        Muon(params, **SETTINGS).load_state_dict(torch.optim.AdamW(params).state_dict())
    with pytest.raises(ValueError, match="not groups"):
        Muon([{"params": params}], **SETTINGS)


def test_a_parameter_without_a_gradient_is_left_alone():
    params = parameters((48, 48), (48,))
    before = [p.detach().clone() for p in params]
    Muon(params, **SETTINGS).step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"momentum": 1.0}, {"betas": (0.9, 1.5)}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="must"):
        Muon(parameters((48, 48)), **change)
