from itertools import pairwise

import pytest
import torch

from relic.nn.denoiser import Denoiser, EulerSampler
from relic.nn.student import FewSteps
from relic.ops.actions import controls_of
from tests.worlds import NANO, NANO_WORDS, batch


def network() -> Denoiser:
    torch.manual_seed(0)
    net = Denoiser(NANO, NANO_WORDS).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.requires_grad_(False)


def euler(net, noise, *, given, text, controls, steps, shift, guidance, until):
    """The plain loop, written anew: the state after each step down to the level `until`."""
    grid = [i / steps for i in range(steps, -1, -1)]
    levels = [shift * u / (1 + (shift - 1) * u) for u in grid]
    x = noise.clone()
    for now, after in pairwise(levels):
        if abs(now - until) < 1e-9:
            break
        x[:, : given.shape[1]] = given
        sigma = torch.full(noise.shape[:2], now, dtype=noise.dtype)
        sigma[:, : given.shape[1]] = 0
        told = net(x, sigma=sigma, text=text, controls=controls)
        untold = net(x, sigma=sigma, text=text, controls=controls, drop_text=torch.ones(len(x)).bool())
        x = x + (after - now) * (untold + guidance * (told - untold))
    x[:, : given.shape[1]] = given
    return x


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize(("student", "steps", "shift"), [(4, 12, 5.0), (4, 4, 1.0), (2, 6, 8.0)])
def test_a_trajectory_holds_the_states_of_a_plain_euler_loop_at_the_levels(student, steps, shift, known):
    data, net = batch([0, 1]), network()
    noise = torch.randn(2, 3, 4, 4, 6, dtype=torch.float64)
    given = {
        "given": data.latents[:, :known].double(), "text": data.text,
        "controls": controls_of(data.actions.double()),
    }  # fmt: skip
    levels = FewSteps(steps=student, shift=shift).levels
    sampler = EulerSampler(steps=steps, shift=shift, guidance=2.5)
    states = sampler.trajectory(net, noise, levels=levels, **given)
    assert states.shape == (2, student + 1, *noise.shape[1:])
    for state, until in zip(states.unbind(1), (*levels, 0.0), strict=True):
        plain = euler(net, noise, **given, steps=steps, shift=shift, guidance=2.5, until=until)
        torch.testing.assert_close(state, plain, atol=1e-10, rtol=1e-10)
        assert torch.equal(state[:, :known], given["given"])


def test_steps_that_pass_a_level_by_are_refused():
    with pytest.raises(ValueError, match=r"50 steps shifted by 5 don't stand at all .* use 48 or 52 steps"):
        EulerSampler(steps=50).trajectory(
            network(), torch.zeros(1, 3, 4, 4, 6), levels=FewSteps().levels, given=torch.zeros(1, 1, 4, 4, 6),
            text=torch.zeros(1, 6, dtype=torch.int64), controls=None,
        )  # fmt: skip
