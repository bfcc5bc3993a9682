import pytest
import torch

from relic.ops.actions import encode_actions, integrate
from relic.suite.play import play, reconstruct, why_not
from relic.types import Clip
from tests.bundles import ACTIONS, BOUNDED, FRAMES, image_of, world_of

VIDEO = image_of(frames=41)
STEER = encode_actions(integrate(ACTIONS, d_bar=0.25), d_bar=0.25).float()


def clip_of(video=VIDEO):
    poses = integrate(ACTIONS, d_bar=0.25)
    return Clip(video, poses, torch.tensor([30.0, 30, 23.5, 15.5]), fps=16, d_bar=0.25, captions=("a room",))


@pytest.mark.parametrize("prefix", [1, 17])
def test_play_is_a_session_with_a_true_prefix(prefix):
    session = world_of().start(VIDEO[0], "a room", seed=3)
    if prefix > 1:
        session.prefill(VIDEO[1:prefix], STEER[1:prefix])
    steps = [session.step(stretch) for stretch in STEER[prefix:].split(FRAMES)]
    told = []
    video = play(world_of(), clip_of(), prefix=prefix, seed=3, progress=told.append)
    assert torch.equal(video[:prefix], VIDEO[:prefix])
    assert torch.equal(video[prefix:], torch.cat(steps)) and sum(told) == 41 - prefix


def test_actions_are_those_that_the_clip_was_scripted_with():
    assert torch.allclose(STEER, ACTIONS, atol=1e-6)


def test_nothing_after_the_prefix_is_looked_at():
    other = VIDEO.clone()
    other[17:] = 0
    videos = [play(world_of(), clip_of(v), prefix=17, seed=0) for v in (VIDEO, other)]
    assert torch.equal(*videos)


def test_a_reconstruction_is_what_a_session_shows_of_true_frames():
    world = world_of()
    whole = reconstruct(world.vae, VIDEO, block_frames=FRAMES)
    session = world.start(VIDEO[0], "", seed=0)
    assert torch.equal(whole[0], session.shown)
    session.prefill(VIDEO[1:17], ACTIONS[1:17])
    assert torch.equal(whole[16], session.shown) and whole.shape == VIDEO.shape


def test_why_a_world_cannot_play_a_length_is_said():
    assert why_not(world_of(), num_frames=41) is None
    assert "beyond the horizon of this world, 41" in why_not(world_of(), num_frames=81)
    assert "not the image and whole blocks of 8" in why_not(world_of(), num_frames=40)
    assert why_not(world_of(BOUNDED), num_frames=81) is None
