import math

import torch

from relic.ops.losses import draw_sigma, flow_matching_loss, level_weight, ode_regression_loss


def test_the_loss_leaves_out_frames_of_weight_zero_and_averages_the_rest():
    velocity = torch.zeros(2, 3, 1, 2, 2)
    target = torch.ones_like(velocity)
    target[:, 0] = 100.0
    weight = torch.tensor([[0.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    assert flow_matching_loss(velocity, target, weight=weight).tolist() == [1.0, 1.5]


def test_the_bell_has_mean_one_and_is_zero_at_both_ends():
    sigma = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    weight = level_weight(sigma, weighting="bell")
    assert abs(float(weight.mean()) - 1) < 1e-4 and weight[0].abs() < 1e-12 and weight[-1].abs() < 1e-12
    half, exit_level = level_weight(torch.tensor([0.5, 0.625]), weighting="bell")
    assert abs(float(half / exit_level) - 2.08 / 1.91) < 0.01  # published values of its shape


def test_levels_are_drawn_as_named():
    u = torch.linspace(0.0005, 0.9995, 1000)
    assert torch.equal(draw_sigma(u, sampling="uniform", shift=1.0), u)
    normal = draw_sigma(u, sampling="logit_normal", shift=1.0)
    assert abs(float(normal.median()) - 0.5) < 1e-3
    share = float(((normal > 0.2689) & (normal < 0.7311)).float().mean())  # one standard deviation
    assert math.isclose(share, 0.6827, abs_tol=0.01)
    assert float(draw_sigma(u, sampling="uniform", shift=5.0).median()) > 0.8


def test_the_regression_loss_is_a_mean_for_each_sample():
    x0, end = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    end[0, 1] = 3.0
    end[1] = 2.0
    assert ode_regression_loss(x0, end, weight=torch.ones(2, 3)).tolist() == [3.0, 4.0]
    weight = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert ode_regression_loss(x0, end, weight=weight).tolist() == [4.5, 0.0]
