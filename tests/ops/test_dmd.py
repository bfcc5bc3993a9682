import pytest
import torch

from relic.ops.dmd import ScoreLevels, channel_drift, dmd_gradient, mean_error, with_gradient
from relic.ops.flow import guide


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X0, COND, UNCOND = (normal(3, 5, 2, 4, 6, seed=s) for s in range(3))


def test_equal_scores_without_guidance_pull_nowhere():
    real = guide(COND, UNCOND, scale=1.0)
    assert not dmd_gradient(X0, fake=real, real=real).any()


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_of_equal_networks_only_guidance_pulls(weight):
    real = guide(COND, UNCOND, scale=weight)
    gradient = dmd_gradient(X0, fake=COND, real=real)
    normaliser = (X0 - real)[:, 1:].abs().mean((1, 2, 3, 4), keepdim=True)
    expected = (1 - weight) * (COND - UNCOND) / normaliser
    torch.testing.assert_close(gradient[:, 1:], expected[:, 1:], rtol=1e-12, atol=1e-12)
    assert not gradient[:, 0].any()


def test_the_normaliser_belongs_to_the_sample_and_leaves_the_first_latent_out():
    real, changed = COND.clone(), COND.clone()
    changed[:, 0] += 100  # the image latent says nothing
    changed[2] *= 7  # nor does another sample
    a, b = (dmd_gradient(X0, fake=UNCOND, real=r) for r in (real, changed))
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2], b[2])
    scaled = dmd_gradient(3 * X0, fake=3 * UNCOND, real=3 * COND)
    torch.testing.assert_close(scaled, a)


def test_a_clip_that_the_teacher_takes_for_perfect_has_a_finite_gradient():
    assert dmd_gradient(X0, fake=UNCOND, real=X0).isfinite().all()


def test_half_precision_is_scored_in_single():
    half = [x.bfloat16() for x in (X0, UNCOND, COND)]
    gradient = dmd_gradient(half[0], fake=half[1], real=half[2])
    whole = dmd_gradient(half[0].double(), fake=half[1].double(), real=half[2].double())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, whole.float())


def test_the_inner_product_and_the_squared_form_have_one_gradient():
    pull = dmd_gradient(X0, fake=COND, real=UNCOND)
    x, y = X0.clone().requires_grad_(), X0.clone().requires_grad_()
    with_gradient(x, pull / pull.numel()).backward()
    (0.5 * (y - (y - pull).detach()).square().mean()).backward()  # as published
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-15)


def test_the_inner_product_gives_the_same_gradient_wherever_it_is_taken():
    pull = dmd_gradient(X0, fake=COND, real=UNCOND)
    grads = []
    for shift in (0.0, 1e-3):  # what a second computation in half precision may differ by
        x = (X0 + shift).requires_grad_()
        with_gradient(x, pull).backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], pull)


def test_levels_are_shifted_and_clamped():
    sigma = ScoreLevels()(torch.tensor([0.0, 0.5, 0.999]))
    torch.testing.assert_close(sigma, torch.tensor([0.02, 5 / 6, 0.98]))
    plain = ScoreLevels(shift=1.0, low=0.1, high=0.9)(torch.linspace(0, 1, 5))
    torch.testing.assert_close(plain, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))


def test_drift_is_the_way_of_the_colours_from_the_first_to_the_last_block():
    latents = normal(2, 1 + 6, 3, 4, 6)
    latents[:, 5:] = latents[:, 1:3] + torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)[:, None, None]
    expected = torch.full((2,), (25 / 3) ** 0.5)
    torch.testing.assert_close(channel_drift(latents, block_latents=2), expected)
    assert not channel_drift(latents[:, :3], block_latents=2).any()  # one block is first and last


def test_the_error_of_a_prediction_leaves_the_first_latent_out():
    predicted = X0.clone()
    predicted[:, 0] += 100
    predicted[:, 1:] += 2
    torch.testing.assert_close(mean_error(X0, predicted), torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("levels", [{"low": 0.0}, {"high": 1.0}, {"low": 0.9, "high": 0.1}])
def test_levels_that_nothing_can_be_scored_at_are_refused(levels):
    with pytest.raises(ValueError, match=r"low=.* and high=.* must be levels between 0 and 1"):
        ScoreLevels(**levels)
    with pytest.raises(ValueError, match=r"shift=0\.5"):
        ScoreLevels(shift=0.5)
