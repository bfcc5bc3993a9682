from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from relic.callbacks.panel import path_from_above
from relic.cli import main
from relic.data.video import count_frames, encode_video
from relic.ops.actions import integrate, parse_script
from relic.verbs.rollout import glance, padded
from relic.world import Scene
from tests.bundles import ACTIONS, BOUNDED, FRAMES, SHORT, image_of, world_of

SCRIPT = "dolly_in*8 pan_left+dolly_in*12"  # two blocks and a half


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("worlds") / "bundle"
    world_of().save(path)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(image_of().numpy()).save(path)
    return path


def rollout(bundle, image, out, *options, actions=SCRIPT):
    main(["rollout", str(bundle), "--image", str(image), "--actions", actions, "--out", str(out), *options])


def shown(prompt: str = "", *, seed: int = 0) -> np.ndarray:
    """The frames that a session shows for the script."""
    session = world_of().start(image_of(), prompt, seed=seed)
    steer = parse_script(f"{SCRIPT} static*4")[1:].split(FRAMES)
    return torch.cat([session.shown[None], *(session.step(actions) for actions in steer)]).numpy()


def test_a_rollout_writes_the_frames_that_a_session_shows(bundle, image, tmp_path, capsys):
    out = tmp_path / "videos" / "out.mp4"
    rollout(bundle, image, out, "--prompt", "a red room", "--seed", "3", "--device", "cpu")
    said = capsys.readouterr().out
    assert "20 frames, and 4 static ones to fill the last block of 8" in said
    assert "25 frames of 32x48, 1.6 s" in said and "image " not in said, "the image already fits"
    assert out.read_bytes() == encode_video(shown("a red room", seed=3), fps=16)[0]
    assert count_frames(out.read_bytes()) == 25


def test_a_world_with_a_picture_of_its_own_is_entered_there(bundle, tmp_path):
    scene = Scene(image=image_of(), prompt="a red room")
    replace(world_of(), scene=scene).save(tmp_path / "bundle")
    out = tmp_path / "out.mp4"
    words = ["--actions", SCRIPT, "--out", str(out), "--seed", "3", "--device", "cpu"]
    main(["rollout", str(tmp_path / "bundle"), *words])
    assert out.read_bytes() == encode_video(shown("a red room", seed=3), fps=16)[0]
    main(["rollout", str(tmp_path / "bundle"), "--prompt", "a lamp", *words])
    assert out.read_bytes() == encode_video(shown("a lamp", seed=3), fps=16)[0]
    with pytest.raises(SystemExit, match="no picture of its own to start from: give an image"):
        main(["rollout", str(bundle), *words])


def test_gamma_is_the_speed_of_the_script(bundle, image, tmp_path):
    videos = []
    for gamma, script in (("2.0", "pan_left*8"), ("1.0", "pan_left*8")):
        out = tmp_path / f"{gamma}.mp4"
        rollout(bundle, image, out, "--gamma", gamma, actions=script)
        videos.append(out.read_bytes())
    assert videos[0] != videos[1]


def test_a_panel_and_a_picture_of_the_memory_are_drawn_on_demand(bundle, image, tmp_path):
    out, picture = tmp_path / "out.mp4", tmp_path / "memory.png"
    rollout(bundle, image, out, "--panel", "true", "--memory", str(picture))
    path = path_from_above(integrate(parse_script(f"{SCRIPT} static*4")), size=32).numpy()
    joined = np.concatenate([shown(), np.full((25, 32, 2, 3), 255, np.uint8), path], axis=2)
    assert out.read_bytes() == encode_video(joined, fps=16)[0]
    assert Image.open(picture).size[0] > 1000


@pytest.mark.parametrize("policy", [SHORT, BOUNDED], ids=str)
def test_a_glance_is_of_what_the_memory_holds(policy):
    world = world_of(policy)
    session = world.start(image_of(), "a room")
    seen = []
    for actions in ACTIONS[1:].repeat(2, 1).split(FRAMES)[: 5 if policy is SHORT else 9]:
        before = session.rollout.memory.fork()
        session.step(actions)
        seen.append((glance(session, before), before))
    for look, before in seen:
        window = look.factors[look.first_of_window :]
        assert set(window) == {1} and look.first_own == len(look.factors) - 2
        kept = before.kept()
        assert {i: f for i, f in enumerate(look.factors[: look.first_of_window]) if f} == {
            i: policy.factor(i) for i in kept
        }
        assert abs(look.window + look.memory + look.own - 1) < 1e-6
    last = seen[-1][0]
    if policy is SHORT:
        assert last.factors == (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1)
    else:
        assert sum(f > 0 for f in last.factors) == 7 and last.factors[0] == 1 and 0 in last.factors


def test_scripts_of_whole_blocks_are_left_alone():
    assert torch.equal(padded(ACTIONS, frames=8), ACTIONS)
    longer = padded(ACTIONS[:4], frames=8)
    assert len(longer) == 9 and (longer[4:, 12] == 1).all() and not longer[4:, :12].any()


def test_an_endless_world_takes_a_script_of_any_length(image, tmp_path):
    world_of(BOUNDED, steps=1).save(tmp_path / "endless")
    rollout(tmp_path / "endless", image, tmp_path / "out.mp4", actions="pan_left*80")
    assert count_frames((tmp_path / "out.mp4").read_bytes()) == 81


# -- errors --------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_any_step(bundle, image, tmp_path, monkeypatch):
    out = tmp_path / "out.mp4"
    monkeypatch.setattr("relic.session.Session.step", None)  # no step may be taken
    cases = [
        ({"actions": "dolly_in*8 jump*8"}, "'jump' is neither a key .* nor an action"),
        ({"actions": "dolly_in*x"}, r"'dolly_in\*x': write an action as name\*frames"),
        ({"actions": " "}, "actions are empty"),
        (
            {"actions": "pan_left*41"},
            r"49 frames long with its image, the horizon of this world 41.*max_latents",
        ),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit, match=f"relic rollout: .*{message}"):
            rollout(bundle, image, out, **words)
    with pytest.raises(SystemExit, match=r"No image at .*none\.png"):
        rollout(bundle, tmp_path / "none.png", out)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    with pytest.raises(SystemExit, match=r"text\.png is not a picture"):
        rollout(bundle, text, out)
    with pytest.raises(SystemExit, match=r"gamma=0\.0 must be positive"):
        rollout(bundle, image, out, "--gamma", "0")
    with pytest.raises(SystemExit, match=r"out=.*out\.avi must end in \.mp4"):
        rollout(bundle, image, tmp_path / "out.avi")
    with pytest.raises(SystemExit, match=r"No world at .*nowhere"):
        rollout(tmp_path / "nowhere", image, out)
    assert not out.exists()
