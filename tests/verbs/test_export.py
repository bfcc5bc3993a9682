from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from relic.cli import main
from relic.data.picture import fitted
from relic.ops.retention import Compressed, Full
from relic.verbs.export import median_d_bar
from relic.world import World
from tests.bundles import CLIP, SHORT, write_files
from tests.data.recordings import clip_sample, latents_sample, write_dataset


def export(student, vae, out, *options):
    main(["export", student, "--vae", vae, "--out", str(out), *options])


def test_a_students_files_become_a_world(tmp_path, capsys):
    student, vae = write_files(tmp_path / "runs")
    export(student, vae, tmp_path / "bundle", "--d_bar", "0.125")
    world = World.load(tmp_path / "bundle")
    assert world.d_bar == 0.125 and world.config.policy == SHORT and not world.endless
    said = capsys.readouterr().out
    assert "32x48, 16 fps, blocks of 2 latents" in said and "horizon    41 frames" in said
    assert "d_bar      0.125 scene units a frame" in said


def test_the_unit_of_motion_is_the_median_over_recordings_that_translate(tmp_path):
    root = write_dataset(tmp_path / "data", [(f"walk{i}", clip_sample(97, seed=i)) for i in range(3)])
    from relic.data.index import Index

    steps = sorted(row.d_bar for row in Index.read(root).rows)
    assert steps[0] < steps[1] < steps[2]
    assert median_d_bar(str(root), fps=16) == steps[1]
    assert median_d_bar(str(root), fps=8) == 2 * steps[1], "at half the rate a frame is a step twice as long"
    student, vae = write_files(tmp_path / "runs")
    export(student, vae, tmp_path / "bundle", "--data", str(root))
    assert yaml.safe_load((tmp_path / "bundle" / "world.yaml").read_text())["d_bar"] == steps[1]


def test_windows_of_one_recording_count_once(tmp_path):
    root = write_dataset(tmp_path, [(f"window{i}", latents_sample(seed=i)) for i in range(5)])
    assert median_d_bar(str(root), fps=16) == 0.1


def test_a_bounded_memory_is_asked_for_at_export(tmp_path, capsys):
    student, vae = write_files(tmp_path / "runs")
    export(student, vae, tmp_path / "bundle", "--d_bar", "1", "--max_latents", "7")
    world = World.load(tmp_path / "bundle")
    assert world.endless and world.config.policy == Compressed(window=4, schedule=(1, 2), max_latents=7)
    assert "streams are endless" in capsys.readouterr().out


def test_a_world_may_be_played_with_another_memory_than_it_was_fitted_with(tmp_path):
    student, vae = write_files(tmp_path / "runs", Full())
    policy = ["--policy", "compressed:2:2,1", "--max_latents", "7"]
    export(student, vae, tmp_path / "bundle", "--d_bar", "1", *policy)
    expected = Compressed(window=2, schedule=(2, 1), max_latents=7)
    assert World.load(tmp_path / "bundle").config.policy == expected
    with pytest.raises(SystemExit, match="policy 'none' is not known; known are own, full"):
        export(student, vae, tmp_path / "other", "--d_bar", "1", "--policy", "none")


def test_a_world_may_be_played_in_other_steps_than_it_was_fitted_with(tmp_path, capsys):
    student, vae = write_files(tmp_path / "runs")
    export(student, vae, tmp_path / "own", "--d_bar", "1")
    options = ["--steps", "2", "--context", "last_step"]
    export(student, vae, tmp_path / "bundle", "--d_bar", "1", *options)
    own, other = (World.load(tmp_path / name).config.sampler for name in ("own", "bundle"))
    assert other == replace(own, steps=2, context="last_step") != own
    assert "sampler    FewSteps(steps=2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="steps=0 must be at least 1"):
        export(student, vae, tmp_path / "none", "--d_bar", "1", "--steps", "0")


def test_weights_are_rounded_and_a_picture_is_put_in_on_demand(tmp_path):
    student, vae = write_files(tmp_path / "runs")
    wide = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "room.png")
    picture = ["--image", str(tmp_path / "room.png"), "--prompt", "a red room"]
    export(student, vae, tmp_path / "bundle", "--d_bar", "1", "--dtype", "bfloat16", *picture)
    export(student, vae, tmp_path / "whole", "--d_bar", "1")
    half, whole = World.load(tmp_path / "bundle"), World.load(tmp_path / "whole")
    assert torch.equal(half.scene.image, torch.from_numpy(fitted(Image.fromarray(wide), height=32, width=48)))
    assert half.scene.prompt == "a red room" and whole.scene is None
    for one, other in ((half.net, whole.net), (half.vae, whole.vae)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b.bfloat16().float())
    sizes = [(tmp_path / name / "student.safetensors").stat().st_size for name in ("bundle", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_matrices_of_the_student_are_rounded_to_8_bits_on_demand(tmp_path):
    student, vae = write_files(tmp_path / "runs")
    export(student, vae, tmp_path / "small", "--d_bar", "1", "--dtype", "int8")
    export(student, vae, tmp_path / "whole", "--d_bar", "1")
    small, whole = World.load(tmp_path / "small"), World.load(tmp_path / "whole")
    changed = 0
    for a, b in zip(small.net.parameters(), whole.net.parameters(), strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= b.abs().max() / 253
        changed += not torch.equal(a, b)
    assert changed
    for a, b in zip(small.vae.parameters(), whole.vae.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())
    again = tmp_path / "small" / "student.safetensors"  # what was rounded is a student as any other
    export(str(again), vae, tmp_path / "again", "--d_bar", "1", "--dtype", "bfloat16")
    for a, b in zip(World.load(tmp_path / "again").net.parameters(), small.net.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())


def test_what_cannot_be_exported_is_named(tmp_path):
    student, vae = write_files(tmp_path / "runs")
    out = tmp_path / "bundle"
    with pytest.raises(SystemExit, match=r"relic export: give either --data, the training set, or --d_bar"):
        export(student, vae, out)
    with pytest.raises(SystemExit, match="give either --data"):
        export(student, vae, out, "--d_bar", "1", "--data", "somewhere")
    with pytest.raises(SystemExit, match="holds a tiny_vae, but a student is needed"):
        export(vae, vae, out, "--d_bar", "1")
    with pytest.raises(SystemExit, match="No weights at"):
        export(student, str(tmp_path / "none.safetensors"), out, "--d_bar", "1")
    with pytest.raises(SystemExit, match="max_latents=5 must leave a latent of each factor"):
        export(student, vae, out, "--d_bar", "1", "--max_latents", "5")
    with pytest.raises(SystemExit, match=r"max_latents=12 goes beyond the 11 latents .* use at most 11"):
        export(student, vae, out, "--d_bar", "1", "--max_latents", "12")
    full, vae = write_files(tmp_path / "full", Full())
    with pytest.raises(SystemExit, match=r"max_latents=9 bounds a compressed memory; this one is Full"):
        export(full, vae, out, "--d_bar", "1", "--max_latents", "9")
    with pytest.raises(SystemExit, match=r"d_bar=-1\.0 must be positive"):
        export(student, vae, out, "--d_bar", "-1")
    with pytest.raises(SystemExit, match="prompt='a lamp' says what is in a picture: give --image too"):
        export(student, vae, out, "--d_bar", "1", "--prompt", "a lamp")
    assert not out.exists()


def test_a_data_set_without_motion_has_no_unit(tmp_path):
    root = write_dataset(tmp_path, [("still", {**latents_sample(), **stand_still()})])
    with pytest.raises(ValueError, match=r"no valid recording that translates, so no d_bar; give --d_bar"):
        median_d_bar(str(root), fps=CLIP.fps)


def stand_still() -> dict[str, bytes]:
    from relic.data.schema import ACTIONS, dump_array

    return {ACTIONS: dump_array(np.zeros((33, 13), np.float32))}
