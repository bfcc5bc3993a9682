from dataclasses import replace

import pytest
import torch

from relic.ops.actions import controls_of, integrate
from relic.ops.retention import Full, SinkWindow, Window
from relic.ops.video import from_uint8, to_uint8
from relic.session import Session, Snapshot
from relic.world import World
from tests.bundles import ACTIONS, BOUNDED, FRAMES, SHORT, image_of, world_of

BLOCKS = ACTIONS[1:].split(FRAMES)  # 5 blocks, the whole horizon
LONG = ACTIONS[1:].repeat(3, 1).split(FRAMES)  # 15 blocks


def session_of(world: World | None = None, *, seed: int = 3, **settings: object) -> Session:
    return (world or world_of()).start(image_of(), "a red room", seed=seed, **settings)


def play(session: Session, blocks=BLOCKS) -> torch.Tensor:
    return torch.cat([session.step(actions) for actions in blocks])


# -- what is shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Full(), Window(latents=2), SinkWindow(sink=1, window=4), SHORT], ids=str)
@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_a_session_shows_what_one_rollout_decoded_as_a_whole_shows(policy, context):
    world = world_of(policy, context=context)
    session = session_of(world)
    shown = torch.cat([session.shown[None], play(session)])

    rollout, text = world.rollout(3), world.read("a red room")
    pixels = from_uint8(image_of().permute(2, 0, 1))[None, None]
    image = world.vae.encode(pixels)
    rollout.prefill(image, ACTIONS[None, :1], text=text)
    blocks = [block.latents for block in rollout([b[None] for b in BLOCKS], text=text)]
    video = to_uint8(world.vae.decode(torch.cat([image, *blocks], dim=1)))[0]
    assert shown.shape == (41, 32, 48, 3) and shown.dtype == torch.uint8
    # chunks add up in another order: a value may round to the neighbouring grey
    assert (shown.int() - video.int()).abs().max() <= 1
    assert video.float().std() > 10 and (video[1:] != video[:-1]).float().mean() > 0.2


def test_the_same_seed_actions_and_prompts_give_the_same_frames_and_others_do_not():
    world = world_of()
    first = play(session_of(world), BLOCKS[:2])
    assert torch.equal(play(session_of(world), BLOCKS[:2]), first)
    assert not torch.equal(play(session_of(world, seed=4), BLOCKS[:2]), first)
    assert not torch.equal(play(session_of(world), BLOCKS[1:3]), first)
    assert not torch.equal(play(world.start(image_of(1), "a red room", seed=3), BLOCKS[:2]), first)


def test_a_prompt_holds_from_the_block_on_that_it_is_given_with():
    world = world_of()
    with torch.no_grad():  # words start silent
        world.net.words.weight.normal_(generator=torch.Generator().manual_seed(0))
    plain = play(session_of(world))
    by_argument, by_attribute = session_of(world), session_of(world)
    frames = [by_argument.step(BLOCKS[0]), by_argument.step(BLOCKS[1], prompt="a blue hall")]
    frames.append(by_argument.step(BLOCKS[2]))
    by_attribute.step(BLOCKS[0])
    by_attribute.prompt = "a blue hall"
    assert torch.equal(frames[0], plain[:FRAMES])
    assert not torch.equal(frames[1], plain[FRAMES : 2 * FRAMES])
    assert torch.equal(torch.cat([by_attribute.step(b) for b in BLOCKS[1:3]]), torch.cat(frames[1:]))
    assert by_argument.snapshot().prompts == ("a red room", "a red room", "a blue hall", "a blue hall")


def test_networks_get_poses_in_steps_whatever_the_scene_unit_is():
    world = world_of()
    session = session_of(world)
    play(session)
    expected = controls_of(ACTIONS[None]).poses[:, -FRAMES:]
    assert torch.allclose(session.block.controls.poses.double(), expected.double(), atol=1e-6)
    assert world.d_bar == 0.25 and integrate(ACTIONS)[8, 2, 3] == 8.0  # 8 steps, not 2 scene units


def test_a_session_says_where_it_stands():
    session = session_of()
    assert (session.frames, session.num_frames, session.blocks_left) == (FRAMES, 1, 5)
    frames = session.step(BLOCKS[0])
    assert (session.num_frames, session.blocks_left) == (9, 4) and session.block.index == 1
    assert torch.equal(session.shown, frames[-1])
    assert session_of(world_of(BOUNDED)).blocks_left is None


# -- true blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_prefilled_blocks_are_encoded_as_the_clip_they_are_part_of(context):
    world, video = world_of(context=context), image_of(5, frames=1 + 2 * FRAMES)
    session = world.start(video[0], "a red room", seed=3)
    session.prefill(video[1:], ACTIONS[1 : 1 + 2 * FRAMES])
    stepped = session.step(BLOCKS[2])

    rollout, text = world.rollout(3), world.read("a red room")
    latents = world.vae.encode(from_uint8(video.permute(0, 3, 1, 2))[None])
    rollout.prefill(latents, ACTIONS[None, : 1 + 2 * FRAMES], text=text)
    block = rollout.step(BLOCKS[2][None], text=text)
    torch.testing.assert_close(session.block.latents, block.latents, rtol=0, atol=1e-4)
    assert session.num_frames == 25 and session.snapshot().true_blocks == 3
    other = session_of(world)
    play(other, BLOCKS[:2])
    assert not torch.equal(other.step(BLOCKS[2]), stepped)


def test_prefilling_at_once_or_block_by_block_is_the_same():
    world, video = world_of(), image_of(5, frames=2 * FRAMES)
    once, parts = session_of(world), session_of(world)
    once.prefill(video, ACTIONS[1 : 1 + 2 * FRAMES])
    for frames, actions in zip(video.split(FRAMES), BLOCKS, strict=False):
        parts.prefill(frames, actions)
    assert torch.equal(once.step(BLOCKS[2]), parts.step(BLOCKS[2]))


# -- undo ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Full(), SHORT, BOUNDED], ids=str)
def test_what_is_undone_and_played_again_is_the_same(policy):
    session = session_of(world_of(policy))
    blocks = BLOCKS if policy is not BOUNDED else LONG
    frames = play(session, blocks)
    last, latents = session.snapshot(), session.block.latents
    session.undo(2)
    assert session.num_frames == 1 + (len(blocks) - 2) * FRAMES
    assert torch.equal(session.shown, frames[-2 * FRAMES - 1])
    assert torch.equal(play(session, blocks[-2:]), frames[-2 * FRAMES :])
    assert torch.equal(session.block.latents, latents)
    again = session.snapshot()
    assert torch.equal(again.latents, last.latents) and torch.equal(again.actions, last.actions)


def test_another_way_can_be_taken_after_undo():
    session, straight = session_of(), session_of()
    play(session, BLOCKS[:3])
    session.undo()
    other = session.step(BLOCKS[4])
    play(straight, BLOCKS[:2])
    assert torch.equal(straight.step(BLOCKS[4]), other)
    ours, theirs = session.snapshot(), straight.snapshot()
    assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.actions, theirs.actions)


def test_undo_reaches_back_into_true_blocks_after_which_true_blocks_may_follow():
    video = image_of(5, frames=2 * FRAMES)
    session = session_of()
    session.prefill(video, ACTIONS[1 : 1 + 2 * FRAMES])
    frames = session.step(BLOCKS[2])
    session.undo(2)
    assert session.snapshot().true_blocks == 2
    session.prefill(video[FRAMES:], BLOCKS[1])
    assert torch.equal(session.step(BLOCKS[2]), frames)


def test_copies_are_of_the_last_seconds_only():
    session = session_of(world_of(BOUNDED), undo_seconds=2.0)  # 16 frames a second: 4 blocks of 8
    play(session, LONG[:6])
    assert session.blocks_to_undo == 4
    with pytest.raises(ValueError, match=r"undo\(5\) must be of 1 to 4 blocks.*restore a snapshot"):
        session.undo(5)
    none = session_of(undo_seconds=0)
    none.step(BLOCKS[0])
    with pytest.raises(ValueError, match=r"undo\(1\) must be of 1 to 0 blocks"):
        none.undo()
    with pytest.raises(ValueError, match="undo_seconds=-1"):
        session_of(undo_seconds=-1)


# -- snapshots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Full(), Window(latents=2), SHORT], ids=str)
@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_a_restored_session_goes_on_bit_for_bit(policy, context, tmp_path):
    world = world_of(policy, context=context)
    session = session_of(world)
    session.step(BLOCKS[0])
    session.step(BLOCKS[1], prompt="a blue hall")
    session.step(BLOCKS[2])
    session.snapshot().save(tmp_path / "here.pt")
    rest = play(session, BLOCKS[3:])

    resumed = world.resume(Snapshot.load(tmp_path / "here.pt"))
    assert resumed.prompt == "a blue hall" and resumed.num_frames == 25
    assert torch.equal(play(resumed, BLOCKS[3:]), rest)
    assert torch.equal(resumed.block.latents, session.block.latents)
    assert torch.equal(resumed.snapshot().latents, session.snapshot().latents)


def test_restoring_takes_a_pass_a_block_and_no_denoising():
    world = world_of(steps=4)
    session = session_of(world)
    play(session)
    passes = []
    handle = world.net.register_forward_hook(lambda *args: passes.append(1))
    session.restore(session.snapshot())
    handle.remove()
    assert len(passes) == 6


@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_true_blocks_survive_a_snapshot(context):
    session = session_of(world_of(context=context))
    session.prefill(image_of(5, frames=2 * FRAMES), ACTIONS[1 : 1 + 2 * FRAMES])
    session.step(BLOCKS[2])
    saved = session.snapshot()
    rest = session.step(BLOCKS[3])
    session.restore(saved)
    assert torch.equal(session.step(BLOCKS[3]), rest) and session.snapshot().true_blocks == 3


def test_an_endless_session_keeps_latents_up_to_the_first_eviction_and_generates_the_rest_again():
    world = world_of(BOUNDED)
    session = session_of(world)
    play(session, LONG[:10])
    saved = session.snapshot()
    assert len(saved.latents) == 7 == BOUNDED.max_latents
    assert len(saved.actions) == 81
    kept = session.rollout.memory.kept()
    assert max(kept) > 7, "something was evicted"
    rest = play(session, LONG[10:12])
    resumed = world.resume(saved)
    assert resumed.rollout.memory.kept() == kept
    assert torch.equal(play(resumed, LONG[10:12]), rest)
    assert torch.equal(resumed.block.latents, session.block.latents)


def test_a_session_can_be_saved_before_its_first_step():
    world = world_of()
    session = session_of(world)
    resumed = world.resume(session.snapshot())
    assert torch.equal(resumed.shown, session.shown) and resumed.num_frames == 1
    assert torch.equal(play(resumed, BLOCKS[:2]), play(session, BLOCKS[:2]))


def test_undo_works_after_a_restore():
    session = session_of()
    frames = play(session)
    session.restore(session.snapshot())
    session.undo(3)
    assert torch.equal(play(session, BLOCKS[2:]), frames[2 * FRAMES :])


# -- errors --------------------------------------------------------------------------------------------------


def test_calls_that_cannot_work_are_refused_and_change_nothing():
    session, video = session_of(), image_of(5, frames=FRAMES)
    frames = play(session_of(), BLOCKS[:1])
    with pytest.raises(ValueError, match=r"actions are \(7, 13\); 1 block\(s\) of 8 frames take \(8, 13\)"):
        session.step(BLOCKS[0][:7], prompt="never")
    with pytest.raises(ValueError, match="NaN or infinity"):
        session.step(BLOCKS[0] * float("nan"))
    with pytest.raises(ValueError, match=r"video is \(9, 32, 48, 3\).*whole blocks of 8"):
        session.prefill(image_of(5, frames=9), BLOCKS[0])
    with pytest.raises(ValueError, match=r"torch.float32; it must be whole blocks"):
        session.prefill(video.float(), BLOCKS[0])
    assert session.prompt == "a red room" and torch.equal(session.step(BLOCKS[0]), frames)
    with pytest.raises(ValueError, match="True blocks come before generated ones"):
        session.prefill(video, BLOCKS[1])
    play(session, BLOCKS[1:])
    with pytest.raises(ValueError, match=r"horizon of this world is 11 latents.*max_latents"):
        session.step(BLOCKS[0])


def test_a_step_that_is_interrupted_can_be_taken_again():
    world = world_of()
    frames, session = play(session_of(world), BLOCKS[:2]), session_of(world)
    session.step(BLOCKS[0])

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = world.net.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.step(BLOCKS[1])
    handle.remove()
    assert torch.equal(session.step(BLOCKS[1]), frames[FRAMES:])


def test_a_snapshot_of_another_world_or_shape_is_refused(tmp_path):
    session = session_of()
    session.step(BLOCKS[0])
    saved = session.snapshot()
    with pytest.raises(ValueError, match=r"of a world with student another\.\.\., this one has a nano world"):
        session.restore(replace(saved, world="another"))
    for changes in (
        {"actions": saved.actions[:-1]},
        {"prompts": saved.prompts[:1]},
        {"latents": saved.latents[:, :2]},
        {"true_blocks": 0},
        {"latents": saved.latents[:0]},
    ):
        with pytest.raises(ValueError, match="The snapshot holds"):
            session.restore(replace(saved, **changes))
    fewer = replace(world_of().config.sampler, steps=1)
    for other in (world_of(BOUNDED), replace(world_of(), config=replace(world_of().config, sampler=fewer))):
        with pytest.raises(ValueError, match=r"The snapshot was taken where .* was played, here .* is"):
            session.restore(session_of(other).snapshot())
    assert session.num_frames == 9, "nothing has changed"
    torch.save({"format": "relic-session/9"}, tmp_path / "later.pt")
    with pytest.raises(ValueError, match="says 'relic-session/9', this version reads 'relic-session/2'"):
        Snapshot.load(tmp_path / "later.pt")


def test_an_image_of_another_size_or_type_is_refused():
    with pytest.raises(ValueError, match=r"image is \(48, 32, 3\); this world takes \(32, 48, 3\)"):
        world_of().start(image_of().transpose(0, 1), "")
    with pytest.raises(ValueError, match=r"torch.float32; it must be \(h, w, 3\) uint8"):
        world_of().start(image_of().float(), "")
