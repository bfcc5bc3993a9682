import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relic.ops.randomness import clip_key, derive_seed, keyed_generator, keyed_normal, keyed_uniform
from relic.types import Clip

parts = st.one_of(st.integers(-(2**62), 2**62), st.text(max_size=12))
keys = st.lists(parts, min_size=1, max_size=5).map(tuple)
FOUR = torch.tensor([11, 12, 13, 14])


@given(keys)
def test_a_seed_has_63_bits_and_is_the_same_on_repeat(key):
    assert derive_seed(*key) == derive_seed(*key)
    assert 0 <= derive_seed(*key) < 2**63


@given(keys, keys)
def test_different_keys_have_different_seeds(first, second):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 2), (12,)), ((1, 2), (2, 1)), (("1",), (1,)), (("a", "b"), ("ab",)), ((1,), (1, ""))],
)
def test_keys_that_read_alike_are_not_mixed_up(first, second):
    assert derive_seed(*first) != derive_seed(*second)


def test_a_seed_is_the_same_in_every_process_and_forever():
    assert derive_seed(0, "teacher", 7, 42, "noise") == 9026779452712631738


def test_numbers_of_other_libraries_are_the_numbers_they_hold():
    plain = derive_seed(3, "noise")
    assert derive_seed(np.int64(3), np.str_("noise")) == plain
    assert derive_seed(torch.tensor(3), "noise") == plain
    with pytest.raises(TypeError):
        derive_seed(3.0)


def test_noise_of_a_sample_is_the_same_on_repeat_and_differs_by_purpose():
    like = torch.empty(4, 3, 5)
    noise = keyed_normal(FOUR, 0, "teacher", "noise", like=like)
    assert torch.equal(noise, keyed_normal(FOUR.tolist(), 0, "teacher", "noise", like=like))
    for other in ((1, "teacher", "noise"), (0, "student", "noise"), (0, "teacher", "exit")):
        assert not torch.isclose(noise, keyed_normal(FOUR, *other, like=like)).any(dim=(1, 2)).all()


@given(st.permutations(range(4)))
def test_noise_does_not_depend_on_the_order_or_size_of_the_batch(order):
    like = torch.empty(4, 6)
    whole = keyed_normal(FOUR, "noise", like=like)
    assert torch.equal(keyed_normal(FOUR[order], "noise", like=like), whole[order])
    assert torch.equal(keyed_normal(FOUR[order[:1]], "noise", like=like[:1]), whole[order[:1]])
    drawn = keyed_uniform(FOUR, "sigma", size=(2,))
    assert torch.equal(keyed_uniform(FOUR[order], "sigma", size=(2,)), drawn[order])


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keyed_normal(FOUR, "noise", like=torch.empty(4, 2))
    keyed_uniform(FOUR, "sigma")
    keyed_generator("weights")
    assert torch.equal(torch.rand(3), expected)


def test_noise_has_the_shape_and_type_asked_for_and_is_standard_normal():
    noise = keyed_normal(range(64), "noise", like=torch.empty(64, 1000, dtype=torch.bfloat16))
    assert noise.shape == (64, 1000) and noise.dtype == torch.bfloat16
    assert abs(float(noise.float().mean())) < 0.02 and abs(float(noise.float().std()) - 1) < 0.02


def test_uniform_draws_fill_the_unit_interval_and_are_unrelated_between_neighbouring_keys():
    drawn = keyed_uniform(range(2000), "sigma")
    assert drawn.shape == (2000,) and drawn.dtype == torch.float64
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 0.08


def test_as_many_keys_as_samples_are_needed():
    with pytest.raises(ValueError, match="zip"):
        keyed_normal(FOUR, "noise", like=torch.empty(3, 2))


def test_a_clip_is_generated_again_by_its_image_and_seed_wherever_it_goes_on_to():
    draw = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (5, 8, 8, 3), generator=draw, dtype=torch.uint8)
    path = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    clip = Clip(video=video, c2w=path, intrinsics_px=torch.ones(4), fps=16, d_bar=1.0)
    elsewhere = clip._replace(c2w=path + torch.arange(5)[:, None, None], video=video[[0, 4, 3, 2, 1]])
    assert clip_key(clip, seed=1) == clip_key(elsewhere, seed=1)
    others = [clip_key(clip, seed=2), clip_key(clip._replace(video=video.flip(0)), seed=1)]
    assert clip_key(clip, seed=1) not in others
