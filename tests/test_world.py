import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

import relic
from relic.cli import main
from relic.nn.checkpoints import file_sha256
from relic.nn.student import FewSteps
from relic.ops.actions import parse_script
from relic.ops.retention import Full
from relic.ops.video import psnr
from relic.world import Scene, World, write_bundle
from tests.bundles import (
    BOUNDED,
    FRAMES,
    SHORT,
    config_of,
    image_of,
    other_clip,
    vae_of,
    world_of,
    write_files,
)

BLOCK = parse_script("dolly_in*8")[1:]


@pytest.fixture
def bundle(tmp_path):
    path = tmp_path / "bundle"
    world_of().save(path)
    return path


def test_a_world_survives_its_bundle(bundle):
    world, loaded = world_of(), relic.World.load(bundle)
    assert isinstance(loaded, World) and loaded.config == world.config and loaded.d_bar == 0.25
    assert all(
        torch.equal(a, b) for a, b in zip(world.net.parameters(), loaded.net.parameters(), strict=True)
    )
    first, second = (w.start(image_of(), "a red room", seed=1) for w in (world, loaded))
    assert torch.equal(first.step(BLOCK), second.step(BLOCK))
    assert not any(p.requires_grad for net in (loaded.net, loaded.vae) for p in net.parameters())


def test_a_scene_survives_its_bundle_and_is_where_a_world_is_entered(tmp_path):
    world = replace(world_of(), scene=Scene(image=image_of(3), prompt="a red room"))
    world.save(tmp_path / "bundle")
    loaded = World.load(tmp_path / "bundle")
    assert torch.equal(loaded.scene.image, image_of(3)) and loaded.scene.prompt == "a red room"
    expected = world.start(image_of(3), "a red room").step(BLOCK)
    assert torch.equal(loaded.start().step(BLOCK), expected)
    assert not torch.equal(loaded.start(prompt="a lamp").step(BLOCK), expected)
    with pytest.raises(ValueError, match="no picture of its own to start from: give an image"):
        world_of().start()
    with pytest.raises(ValueError, match=r"the scene's image is \(8, 8, 3\), torch.uint8; a picture of the"):
        replace(world_of(), scene=Scene(image=image_of()[:8, :8], prompt=""))
    (tmp_path / "bundle" / "start.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks start.png: copy the bundle again"):
        World.load(tmp_path / "bundle")


def test_the_shipped_world_streams_and_comes_back_to_its_own_picture():
    world = World.load("tiny")
    session = world.start(seed=0)
    away, back = (session.step(stretch) for stretch in parse_script("pan_right*8 pan_left*8")[1:].split(8))
    assert away.shape == back.shape == (8, 128, 256, 3)
    assert psnr(back[-1], world.scene.image) > 22 > psnr(away[-1], world.scene.image) + 3


@pytest.mark.slow
def test_the_shipped_world_remembers_what_its_window_does_not_hold(tmp_path):
    words = [
        "--groups",
        "look_away",
        "--seconds",
        "10",
        "--out",
        str(tmp_path),
        "--policy",
        "own",
        "window:4",
    ]
    main(["evaluate", "tiny", *words])
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]
    scores = [summary[f"tiny ({name})"]["all"]["memory/psnr_revisit"]["mean"] for name in ("own", "window:4")]
    assert scores[0] > 20 and scores[0] > scores[1] + 5


def test_a_shipped_world_is_found_by_name_unless_a_folder_of_that_name_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("relic.world.SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    world_of().save(tmp_path / "shipped" / "nano")
    assert World.load("nano").config == config_of()
    with pytest.raises(FileNotFoundError, match=r"No world at other: .*\. Shipped: nano\."):
        World.load("other")
    (tmp_path / "nano").write_text("a file is no folder")
    assert World.load("nano").config == config_of()
    (tmp_path / "nano").unlink()
    (tmp_path / "nano").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"No world at nano: it holds no world\.yaml\. Rename it to have"
    ):
        World.load("nano")


def test_a_world_prints_what_it_is_and_not_its_weights():
    said = repr(World.load("tiny"))
    assert "max_latents=21" in said and "a yellow doorway and a blue door" in said
    assert "Linear" not in said and "tensor(" not in said and "\n" not in said


def test_a_bundle_says_what_it_is(bundle):
    card = yaml.safe_load((bundle / "world.yaml").read_text())
    assert card["format"] == "relic-world/1" and card["d_bar"] == 0.25
    assert card["policy"] == {"kind": "compressed", "window": 4, "schedule": [1, 2], "max_latents": None}
    assert card["sampler"] == {"steps": 2, "shift": 5.0, "context": "clean"}
    assert card["dit"]["width"] == 32 and card["clip"]["horizons"] == [41]
    assert card["versions"] == {"relic": relic.__version__, "torch": str(torch.__version__)}
    names = sorted(path.name for path in bundle.iterdir())
    assert names == ["student.safetensors", "vae.safetensors", "world.yaml"]
    assert card["files"] == {name: file_sha256(bundle / name) for name in names[:2]}


@pytest.mark.slow
def test_a_bundle_plays_the_same_in_another_process(bundle, tmp_path):
    torch.save(image_of(), tmp_path / "image.pt")
    code = (
        "import sys, torch, relic; from relic.ops.actions import parse_script; "
        "world = relic.World.load(sys.argv[1]); "
        "session = world.start(torch.load(sys.argv[2]), 'a room', seed=7); "
        "torch.save(session.step(parse_script('dolly_in*8')[1:]), sys.argv[3]); "
        "print(*{'lightning', 'relic.modules', 'relic.data'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, bundle, tmp_path / "image.pt", tmp_path / "frames.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == [], "playing loads no training code"
    frames = world_of().start(image_of(), "a room", seed=7).step(BLOCK)
    assert torch.equal(torch.load(tmp_path / "frames.pt"), frames)


def test_half_precision_plays_too(bundle):
    world = World.load(bundle, dtype=torch.bfloat16)
    session = world.start(image_of(), "a red room")
    assert session.rollout.memory.dtype == torch.bfloat16
    exact = world_of().start(image_of(), "a red room")
    frames, reference = session.step(BLOCK).float(), exact.step(BLOCK).float()
    assert frames.shape == (FRAMES, 32, 48, 3)
    assert (frames - reference).abs().mean() < 8, "close to what float32 shows"


def test_snapshots_belong_to_the_weights_of_a_bundle(bundle, tmp_path):
    world = World.load(bundle)
    assert world.name == file_sha256(bundle / "student.safetensors")
    saved = world.start(image_of(), "").snapshot()
    assert World.load(bundle).resume(saved).num_frames == 1
    changed = world_of()
    changed.net.dit.head.head.bias.add_(1)
    changed.save(tmp_path / "other")
    with pytest.raises(ValueError, match="load the world it was taken in"):
        World.load(tmp_path / "other").resume(saved)


def test_a_bounded_memory_makes_a_world_endless():
    assert not world_of(SHORT).endless and world_of(SHORT).plan().num_latents == 11
    assert world_of(BOUNDED).endless and world_of(BOUNDED).plan().num_latents is None


def test_weights_on_disk_are_copied_byte_for_byte(tmp_path):
    student, vae = write_files(tmp_path / "runs")
    write_bundle(tmp_path / "bundle", student=student, vae=vae, d_bar=0.5, config=config_of(BOUNDED))
    world = World.load(tmp_path / "bundle")
    assert world.d_bar == 0.5 and world.config.policy == BOUNDED
    assert file_sha256(student) == file_sha256(tmp_path / "bundle" / "student.safetensors")


# -- errors --------------------------------------------------------------------------------------------------


def rewrite(bundle, **changes):
    card = yaml.safe_load((bundle / "world.yaml").read_text())
    card = {k: v for k, v in {**card, **changes}.items() if v is not None}
    (bundle / "world.yaml").write_text(yaml.safe_dump(card))


def test_a_bundle_that_is_not_there_or_not_whole_is_named(bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No world at .*nowhere: the folder does not exist"):
        World.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no world.yaml. Write one: relic export"):
        World.load(tmp_path)
    (bundle / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks vae.safetensors: copy the bundle again"):
        World.load(bundle)


@pytest.mark.parametrize("found", ["relic-world/0", "relic-world/2", None])
def test_a_bundle_of_another_format_is_refused(bundle, found):
    rewrite(bundle, format=found)
    with pytest.raises(ValueError, match=rf"says format {found!r}, this version .* reads 'relic-world/1'"):
        World.load(bundle)


def test_a_changed_file_is_refused(bundle):
    path = bundle / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"student.safetensors has sha256 .* changed or damaged"):
        World.load(bundle)


def test_a_card_that_disagrees_with_the_weights_or_lacks_something_is_refused(bundle):
    card = yaml.safe_load((bundle / "world.yaml").read_text())
    rewrite(bundle, clip={**card["clip"], "fps": 8})
    with pytest.raises(ValueError, match=r"has clip .*fps=16.* but the world says .*fps=8"):
        World.load(bundle)
    rewrite(bundle, clip=card["clip"], dit={**card["dit"], "depth": 3})
    with pytest.raises(ValueError, match=r"has net .*depth=2.* but the world says .*depth=3"):
        World.load(bundle)
    rewrite(bundle, dit={**card["dit"], "colour": "red"})
    with pytest.raises(ValueError, match=r"world.yaml can't be read \(.*colour.*\); export the world again"):
        World.load(bundle)
    rewrite(bundle, dit=card["dit"], policy={"kind": "dreams"})
    with pytest.raises(ValueError, match="'dreams' is unknown"):
        World.load(bundle)
    rewrite(bundle, policy=None, d_bar=None)
    with pytest.raises(ValueError, match=r"world.yaml lacks d_bar, policy; export the world again"):
        World.load(bundle)


def test_how_a_world_is_played_may_be_changed_in_its_card(bundle):
    card = yaml.safe_load((bundle / "world.yaml").read_text())
    rewrite(bundle, policy={"kind": "full"}, sampler={**card["sampler"], "steps": 3})
    config = World.load(bundle).config
    assert config.policy == Full() and config.sampler == FewSteps(steps=3)


def test_what_does_not_belong_together_is_refused_before_anything_is_written(tmp_path):
    world, target = world_of(), tmp_path / "bundle"
    with pytest.raises(ValueError, match="4 latent channels and the autoencoder 6"):
        replace(world, vae=vae_of(channels=6))
    with pytest.raises(ValueError, match=r"d_bar=0\.0 must be positive"):
        replace(world, d_bar=0.0)
    with pytest.raises(ValueError, match="reads prompt embeddings; a bundle holds no text encoder"):
        replace(world, config=replace(world.config, words=None))
    student, vae = write_files(tmp_path / "runs", channels=6)
    with pytest.raises(ValueError, match="4 latent channels and the autoencoder 6"):
        write_bundle(target, student=student, vae=vae, d_bar=1.0, config=config_of())
    with pytest.raises(ValueError, match=r"has clip .*fps=16.* but the world says"):
        write_bundle(target, student=student, vae=vae, d_bar=1.0, config=other_clip(config_of()))
    with pytest.raises(ValueError, match="holds a tiny_vae, but a student is needed"):
        write_bundle(target, student=vae, vae=vae, d_bar=1.0, config=config_of())
    assert not target.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists; give another folder"):
        world.save(target)


def test_relic_names_its_world_and_nothing_else_by_surprise():
    assert relic.World is World
    with pytest.raises(AttributeError, match="has no attribute 'Wold'"):
        relic.Wold  # noqa: B018
    assert json.dumps(relic.__all__) == '["World", "__version__"]'
