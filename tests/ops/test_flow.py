import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relic.ops.flow import (
    add_noise,
    euler_step,
    guide,
    shift_sigma,
    sigma_schedule,
    steps_to,
    velocity_of,
    x0_of,
)

x0, noise = (torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
levels = torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.9, 0.5]], dtype=torch.float64)


def test_velocity_recovers_clean_latents_at_every_level():
    xt = add_noise(x0, noise, sigma=levels)
    torch.testing.assert_close(x0_of(xt, velocity_of(x0, noise), sigma=levels), x0)


def test_level_zero_leaves_clean_latents_untouched_and_level_one_is_noise():
    xt = add_noise(x0, noise, sigma=levels)
    assert torch.equal(xt[:, 0], x0[:, 0]) and torch.equal(xt[0, 2], noise[0, 2])


def test_a_euler_step_along_the_true_velocity_lands_on_the_interpolation():
    after = 0.5 * levels
    walked = euler_step(
        add_noise(x0, noise, sigma=levels), velocity_of(x0, noise), sigma=levels, next_sigma=after
    )
    torch.testing.assert_close(walked, add_noise(x0, noise, sigma=after))


@pytest.mark.parametrize(
    ("shift", "timesteps"),
    [(3, [1000, 900, 750, 500]), (5, [1000, 937.5, 2500 / 3, 625]), (8, [1000, 960, 8000 / 9, 8000 / 11])],
)
def test_four_even_steps_shift_to_the_published_timesteps(shift, timesteps):
    truth = torch.tensor(timesteps, dtype=torch.float64)
    torch.testing.assert_close(1000 * sigma_schedule(4, shift=shift)[:-1], truth)


def test_48_steps_pass_through_the_four_student_levels():
    fine, coarse = sigma_schedule(48, shift=5.0), sigma_schedule(4, shift=5.0)
    torch.testing.assert_close(fine[::12], coarse, rtol=0, atol=1e-15)


@given(st.floats(0, 1), st.floats(1, 12))
def test_shifting_keeps_the_ends_and_moves_towards_noise(u, shift):
    sigma = float(shift_sigma(torch.tensor(u, dtype=torch.float64), shift=shift))
    assert u - 1e-12 <= sigma <= 1 + 1e-12


def test_guidance_of_one_is_none():
    assert torch.allclose(guide(x0, noise, scale=1.0), x0)
    torch.testing.assert_close(guide(x0, noise, scale=4.0), noise + 4 * (x0 - noise))


def test_half_precision_comes_back_as_half_precision():
    assert add_noise(x0.bfloat16(), noise.bfloat16(), sigma=levels.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
@pytest.mark.parametrize(("steps", "few"), [(48, 4), (4, 4), (20, 4), (1000, 8), (48, 1)])
def test_a_grid_stands_at_the_levels_of_a_coarser_one(shift, steps, few):
    fine, coarse = sigma_schedule(steps, shift=shift), sigma_schedule(few, shift=shift)[:-1]
    done = steps_to(coarse.tolist(), steps=steps, shift=shift)
    assert done == tuple(range(0, steps, steps // few))
    torch.testing.assert_close(fine[list(done)], coarse, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("steps", "shift", "remedy"),
    [(50, 5.0, "use 48 or 52 steps"), (3, 5.0, "use 4 or 8 steps"), (48, 8.0, "use the shift that made")],
)
def test_a_grid_that_passes_a_level_by_says_which_would_not(steps, shift, remedy):
    levels = sigma_schedule(4, shift=5.0)[:-1].tolist()
    with pytest.raises(ValueError, match=remedy):
        steps_to(levels, steps=steps, shift=shift)
