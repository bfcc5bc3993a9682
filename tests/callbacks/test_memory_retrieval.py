"""Memory scores of our own modules; what is refused before training; the picture of PSNR against time."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

from relic.callbacks import ActionFollowing, MemoryRetrieval
from relic.callbacks.memory_retrieval import curve
from relic.metrics import RevisitRule
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.actions import CHANNELS, integrate, parse_script
from relic.types import Clip, ClipSpec
from tests.callbacks.foreign import PREFIX, Foreign, Known, clip_of
from tests.modules.test_student import student
from tests.modules.test_teacher import teacher
from tests.worlds import LatentWorld

CLIP = ClipSpec(height=32, width=48, horizons=(17,), block_latents=2)
RULE = RevisitRule(gap_seconds=0.5)


def small_clip(seed: int) -> Clip:
    """Return 17 frames, 4 a second, of a camera that turns away by 80 degrees and back."""
    actions = torch.zeros(17, len(CHANNELS), dtype=torch.float64)
    actions[1:9, CHANNELS.index("pan_left")] = 10
    actions[9:, CHANNELS.index("pan_right")] = 10
    draw = torch.Generator().manual_seed(seed)
    out = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=draw)
    intrinsics = torch.tensor([60.0, 60.0, 23.5, 15.5], dtype=torch.float64)
    return Clip(torch.cat([out, out[:-1].flip(0)]), integrate(actions, d_bar=0.1), intrinsics, 4.0, 0.1)


def write_vae(folder: Path) -> str:
    torch.manual_seed(0)
    config = TinyVAEConfig(latent_channels=4, patch=8, widths=(8,), encoder_depths=(1,), decoder_depths=(1,))
    TinyVAE(config).save(folder / "tiny_vae.safetensors")
    return str(folder / "tiny_vae.safetensors")


def settings(root: Path) -> dict:
    return {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root, "use_distributed_sampler": False,
    }  # fmt: skip


def test_the_teacher_is_scored_against_itself_beside_its_autoencoder(tmp_path, caplog):
    clips = [small_clip(seed) for seed in range(2)]
    callback = MemoryRetrieval(clips, rule=RULE, estimator=Known(clips))
    module = teacher(clip=CLIP, vae=write_vae(tmp_path))
    with caplog.at_level("INFO"):
        trainer = Trainer(**settings(tmp_path), max_steps=4, val_check_interval=2, callbacks=callback)
        trainer.fit(module, LatentWorld(batches=8))
    said = [record.message for record in caplog.records if "scored against itself" in record.message]
    assert len(said) == 1 and "prefix_frames=9" in said[0]  # two validations, one attempt
    assert callback.validations == 2
    scores = trainer.callback_metrics
    assert scores["memory/clips"] == scores["memory/clips_self"] == 2 and scores["memory/pairs_self"] > 0
    assert not any("revisit" in name for name in scores)
    for name in ("psnr_self", "ssim_self", "psnr_self_truth", "psnr_self_autoencoder"):
        assert torch.isfinite(scores[f"memory/{name}"]), name
    assert scores["memory/psnr_self_truth"] == 60  # the way back shows what the way out showed


def test_the_student_is_scored_against_the_truth_after_a_prefix_of_whole_blocks(tmp_path):
    clips = [small_clip(seed) for seed in range(2)]
    callbacks = [
        MemoryRetrieval(clips, rule=RULE, estimator=Known(clips)),
        ActionFollowing(clips, estimator=Known(clips)),
    ]
    module = student(vae=write_vae(tmp_path))
    module.validation_step = lambda batch, batch_idx: None
    trainer = Trainer(**settings(tmp_path), callbacks=callbacks)
    trainer.validate(module, LatentWorld(), verbose=False)
    scores = trainer.callback_metrics
    assert callbacks[0].prefix_frames(clips[0], module) == 9  # the image and a block of two latents
    assert scores["memory/clips"] == 2 and scores["memory/pairs"] > 0 and scores["memory/did_not_move"] == 0
    assert scores["memory/psnr_revisit"] < scores["memory/psnr_revisit_nearest_seen"] == 60
    assert torch.isfinite(scores["memory/psnr_revisit_autoencoder"])
    assert scores["action/clips"] == 2 and scores["action/rpe_rot_deg"] < 1e-3


def fit(root, module, *callbacks, **changes):
    trainer = Trainer(**settings(root) | {"max_epochs": 1} | changes, callbacks=list(callbacks))
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_scores_do_not_depend_on_the_precision_of_the_run(tmp_path, precision):
    clips = [clip_of(0)]
    found = []
    for chosen in ("32-true", precision):
        callback = MemoryRetrieval(clips, prefix_frames=PREFIX, estimator=Known(clips))
        fit(tmp_path, Foreign(), callback, precision=chosen)
        found.append(callback.latest)
    assert found[0] == pytest.approx(found[1], nan_ok=True)


def test_the_network_runs_in_the_precision_of_the_run(tmp_path):
    class Watching(Foreign):
        def generate(self, clips, **words):
            assert torch.get_default_dtype() == torch.bfloat16
            return super().generate(clips, **words)

    fit(
        tmp_path,
        Watching(),
        ActionFollowing([clip_of(0)], estimator=Known([clip_of(0)])),
        precision="bf16-true",
    )


def test_only_a_refused_prefix_makes_a_module_one_that_takes_the_image_only(tmp_path):
    class Unfinished(Known):
        def estimate(self, video, *, intrinsics_px):
            raise NotImplementedError("not on this machine")

    callback = MemoryRetrieval([clip_of(0)], prefix_frames=PREFIX, estimator=Unfinished([clip_of(0)]))
    with pytest.raises(NotImplementedError, match="not on this machine"):
        fit(tmp_path, Foreign(), callback)
    assert not callback.image_only


def test_a_module_that_refuses_the_image_too_is_not_asked_again(tmp_path):
    class Nothing(Foreign):
        longest_prefix = 0

    with pytest.raises(NotImplementedError, match="prefix_frames=1:"):
        fit(tmp_path, Nothing(), MemoryRetrieval([clip_of(0)], prefix_frames=PREFIX))


def still(clip: Clip) -> Clip:
    return clip._replace(c2w=clip.c2w[:1].expand_as(clip.c2w).clone())


def test_paths_that_never_come_back_are_refused_before_training(tmp_path):
    module = Foreign()
    with pytest.raises(ValueError, match="none of the 2 clips comes back to what it saw"):
        fit(tmp_path, module, MemoryRetrieval([still(clip_of(0)), still(clip_of(1))]))
    assert module.asked == []


def test_clips_too_short_for_a_prefix_are_refused_unless_the_image_is_asked_for(tmp_path):
    short = small_clip(0)._replace(
        video=small_clip(0).video[:9], c2w=small_clip(0).c2w[::2], fps=2.0
    )  # turns away and back in half the frames

    class Blocks(Foreign):
        clip = CLIP

    with pytest.raises(ValueError, match="less than a block"):
        fit(tmp_path, Blocks(), MemoryRetrieval([short], rule=RULE))
    callback = MemoryRetrieval([short], rule=RULE, prefix_frames=1, estimator=Known([short]))
    fit(tmp_path, Blocks(), callback)
    assert callback.latest["memory/clips"] == 1


def test_returns_that_none_of_the_prefixes_saw_are_said(tmp_path):
    path = torch.cat([torch.zeros(1, len(CHANNELS)), parse_script("pan_left*88 pan_right*28")])
    video = clip_of(0).video[:1].expand(len(path), -1, -1, -1)
    clip = clip_of(0)._replace(
        video=video, c2w=integrate(path, d_bar=0.1)
    )  # back to frame 60, not to frame 4
    callback = MemoryRetrieval([clip], prefix_frames=5, estimator=Known([clip]))
    with pytest.warns(UserWarning, match="no clip comes back to what its prefix saw"):
        fit(tmp_path, Foreign(), callback)
    assert callback.latest["memory/no_pair"] == callback.latest["memory/clips"] == 1


def test_the_picture_has_its_spans_in_order_of_time_and_leaves_matplotlib_alone(monkeypatch):
    import matplotlib

    monkeypatch.setattr(matplotlib, "use", lambda *_: pytest.fail("the backend is the user's"))
    scores = {
        "memory/psnr_revisit": 20.0,
        "memory/psnr_revisit_after_16s_up": 14.0,
        "memory/psnr_revisit_after_2_4s": 22.0,
        "memory/psnr_revisit_copy_first_after_4_8s": 11.0,
    }
    picture = curve(scores)
    assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 5
    assert curve({"memory/psnr_revisit": 20.0}) is None
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    curve(scores)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2-4", "4-8", "16 up"]
    assert list(axes.lines[0].get_xdata()) == [0, 2] and list(axes.lines[0].get_ydata()) == [22, 14]
