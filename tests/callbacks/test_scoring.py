"""Memory and action callbacks on a foreign module, under a real Trainer."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relic.callbacks import ActionFollowing, MemoryRetrieval, Recordings
from relic.metrics import RevisitScore
from tests.callbacks.foreign import FRAMES, PREFIX, Foreign, Known, clip_of

CLIPS = [clip_of(seed) for seed in range(3)]


def trainer_of(root, *callbacks, **settings):
    return Trainer(
        **{
            "accelerator": "cpu", "logger": TensorBoardLogger(root, name="log"), "callbacks": list(callbacks),
            "default_root_dir": root, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "num_sanity_val_steps": 1, "max_epochs": 1, "log_every_n_steps": 1,
        }
        | settings
    )  # fmt: skip


def memory(clips=CLIPS, **settings):
    return MemoryRetrieval(clips, **{"prefix_frames": PREFIX, "estimator": Known(CLIPS)} | settings)


def events_of(trainer):
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    return events


def test_what_is_logged_is_what_the_metric_says_of_the_same_videos(tmp_path):
    callback, module = memory(), Foreign()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module)
    direct = RevisitScore()
    for clip in CLIPS:  # by a module as it was at the first validation
        shown = Foreign().spoiled(clip, PREFIX)
        direct.update(shown, clip, prefix_frames=PREFIX, estimated_c2w=clip.c2w)
    wanted = {name: float(value) for name, value in direct.compute().items()}
    assert callback.latest.keys() == wanted.keys()
    for name, value in wanted.items():
        assert callback.latest[name] == pytest.approx(value, abs=1e-4), name
    assert module.asked == [(PREFIX, 0)] * 3
    assert float(trainer.callback_metrics["memory/psnr_revisit"]) == pytest.approx(
        wanted["memory/psnr_revisit"], abs=1e-3
    )
    assert "memory/lpips_revisit" not in wanted
    images = events_of(trainer).Tags()["images"]
    assert set(images) == {"memory/clip-0", "memory/clip-1", "memory/psnr_since_last_seen"}


def test_checkpoints_are_chosen_by_the_score_also_when_epochs_are_skipped(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="memory/psnr_revisit", mode="max", save_top_k=1)
    callback, module = memory(every_n_validations=2), Foreign()
    trainer = trainer_of(tmp_path, callback, best, max_epochs=4)
    trainer.fit(module)
    assert len(module.asked) == 2 * len(CLIPS)  # the first and the third validation
    logged = [event.value for event in events_of(trainer).Scalars("memory/psnr_revisit")]
    assert len(logged) == 4 and logged[0] == logged[1] < logged[2] == logged[3]
    assert float(best.best_model_score) == pytest.approx(logged[2], abs=1e-3)


def test_a_resumed_run_goes_on_counting_and_knows_the_last_scores(tmp_path):
    last = ModelCheckpoint(tmp_path / "last", save_last=True)
    trainer_of(tmp_path, memory(every_n_validations=2), last, max_epochs=1).fit(Foreign())
    callback, module = memory(every_n_validations=2), Foreign()
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    trainer.fit(module, ckpt_path=tmp_path / "last" / "last.ckpt")
    assert module.asked == []  # the second validation
    assert math.isfinite(float(trainer.callback_metrics["memory/psnr_revisit"]))


def test_a_module_that_takes_the_image_only_is_scored_against_itself(tmp_path):
    class Teacher(Foreign):
        longest_prefix = 1

    callback, module = memory(), Teacher()
    trainer_of(tmp_path, callback).fit(module)
    assert module.asked == [(1, 0)] * 3
    assert "memory/psnr_revisit" not in callback.latest
    assert callback.latest["memory/clips_self"] == 3 and callback.latest["memory/psnr_self"] > 20


def test_a_fault_in_generate_is_not_taken_for_an_image_only_module(tmp_path):
    class Broken(Foreign):
        def generate(self, clips, *, prefix_frames=1, seed):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of(tmp_path, memory()).fit(Broken())


def test_action_following_logs_errors_beside_the_estimators_floor(tmp_path):
    class Slow(Known):
        def estimate(self, video, *, intrinsics_px):
            found = super().estimate(video, intrinsics_px=intrinsics_px)
            # in generated (darkened) videos the camera is seen to stand still
            return (
                found
                if video.float().mean() > 120
                else found._replace(c2w=found.c2w[:1].expand_as(found.c2w))
            )

    callback, module = ActionFollowing(CLIPS, estimator=Slow(CLIPS), every_n_validations=1), Foreign()
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    trainer.fit(module)
    assert module.asked == [(1, 0)] * 6
    scores = callback.latest
    assert scores["action/rpe_rot_deg_floor"] == pytest.approx(0, abs=1e-5)
    assert scores["action/rpe_rot_deg"] == pytest.approx(2.0, abs=1e-3)  # every turn is missed whole
    assert scores["action/coverage"] == 1
    assert callback.estimator.asked == 2 * 3 + 3  # true videos only once


def test_randomness_and_modes_of_the_run_are_left_alone(tmp_path):
    class Watching(Foreign):
        def on_validation_epoch_end(self):  # before the callbacks' own
            self.before = torch.get_rng_state()

        def on_validation_end(self):
            assert torch.equal(self.before, torch.get_rng_state())

    trainer_of(tmp_path, memory()).fit(Watching())


def test_a_spent_budget_ends_it_and_says_after_how_many(tmp_path):
    callback, module = memory(max_seconds=1e-6), Foreign()
    trainer_of(tmp_path, callback).fit(module)
    assert len(module.asked) == 1 and callback.latest["memory/clips"] == 1
    action = ActionFollowing(CLIPS, estimator=Known(CLIPS), max_seconds=1e-6)
    trainer = trainer_of(tmp_path, action)
    trainer.fit(Foreign())
    assert trainer.callback_metrics["action/clips"] == 1


def test_clips_may_come_from_recordings(tmp_path):
    from tests.data.recordings import clip_sample, write_dataset

    root = write_dataset(
        tmp_path / "d", [(f"r{i}", clip_sample(49, seed=i, scene=f"s{i}")) for i in range(3)]
    )
    source = Recordings(root=str(root), num_frames=33, validation_scenes=1, evaluation_scenes=1, num_clips=1)
    callback, module = ActionFollowing(source, estimator=Known(CLIPS)), Foreign()
    trainer_of(tmp_path, callback).fit(module)
    assert len(callback.clips[0].video) == 33 and callback.latest["action/coverage"] == 1


def test_a_foreign_module_may_call_anything_its_clip(tmp_path):
    from tests.data.recordings import clip_sample, write_dataset

    class WithCLIP(Foreign):
        def __init__(self):
            super().__init__()
            self.clip = torch.nn.Linear(2, 2)

    root = write_dataset(
        tmp_path / "d", [(f"r{i}", clip_sample(33, seed=i, scene=f"s{i}")) for i in range(2)]
    )
    source = Recordings(root=str(root), num_frames=33, validation_scenes=1, evaluation_scenes=0, num_clips=1)
    callback = ActionFollowing(source, estimator=Known(CLIPS))
    trainer_of(tmp_path, callback).fit(WithCLIP())
    assert callback.clips[0].video.shape == (33, 64, 64, 3)


def test_validations_by_steps_are_counted_as_well(tmp_path):
    class Longer(Foreign):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(8))

    callback, module = memory(every_n_validations=2), Longer()
    trainer_of(tmp_path, callback, val_check_interval=2).fit(module)
    assert callback.validations == 4 and len(module.asked) == 2 * len(CLIPS)


def test_a_run_without_validation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MemoryRetrieval scores after validations, and this run has none"):
        trainer_of(tmp_path, memory(), limit_val_batches=0).fit(Foreign())


def test_a_prediction_needs_no_clips(tmp_path):
    class Predicting(Foreign):
        def predict_step(self, batch, batch_idx):
            return batch

        predict_dataloader = Foreign.train_dataloader

    source = Recordings(root=str(tmp_path / "nowhere"), num_frames=33)
    callbacks = [MemoryRetrieval(source), ActionFollowing(source)]
    assert len(trainer_of(tmp_path, *callbacks).predict(Predicting())) == 2
    assert callbacks[0].clips == callbacks[1].clips == []


def shorter(clip):
    return clip._replace(video=clip.video[:-4])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: memory([]), ValueError, "was given no clips"),
        (lambda: memory([shorter(CLIPS[0])]), ValueError, "53 frames and 57 poses"),
        (lambda: memory("runs/clips"), TypeError, "is a str; give relic.types.Clip, or name a data set"),
        (lambda: memory([CLIPS[0]._replace(video=CLIPS[0].video.float())]), ValueError, "clip 0: video is"),
        (lambda: memory([CLIPS[0], CLIPS[1]._replace(c2w=CLIPS[1].c2w * 2)]), ValueError, "clip 1: c2w"),
        (lambda: memory(prefix_frames=30), ValueError, "must be 4k"),
        (lambda: memory(prefix_frames=FRAMES), ValueError, "leaves nothing to generate"),
        (lambda: memory(every_n_validations=0), ValueError, "every_n_validations=0"),
        (lambda: memory(max_seconds=0.0), ValueError, "max_seconds=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(tmp_path, make, error, message):
    module = Foreign()
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, make()).fit(module)
    assert module.asked == []


@pytest.mark.parametrize(
    "spoil", [lambda v: v[:-1], lambda v: v.float(), lambda v: v[:, :32], lambda v: v.numpy(), lambda v: None]
)
def test_videos_of_another_shape_or_type_are_refused(tmp_path, spoil):
    class Odd(Foreign):
        def spoiled(self, clip, prefix_frames):
            return spoil(clip.video)

    with pytest.raises(ValueError, match="must give one uint8 video"):
        trainer_of(tmp_path, memory()).fit(Odd())


@pytest.mark.parametrize("answer", [lambda clips: None, lambda clips: [], lambda clips: [clips[0].video] * 2])
def test_another_number_of_videos_is_refused(tmp_path, answer):
    class Odd(Foreign):
        def generate(self, clips, *, prefix_frames=1, seed):
            return answer(clips)

    with pytest.raises(ValueError, match="must give one uint8 video"):
        trainer_of(tmp_path, memory()).fit(Odd())


def test_a_missing_backbone_is_said_and_the_rest_is_scored(tmp_path):
    callback = memory(lpips=str(tmp_path / "nowhere.pth"))
    with pytest.warns(UserWarning, match="LPIPS: not measured"):
        trainer_of(tmp_path, callback).fit(Foreign())
    assert callback.latest["memory/psnr_revisit"] > 10


SCRIPT = """
import json, sys
from lightning import Trainer
from relic.callbacks import ActionFollowing, MemoryRetrieval
from tests.callbacks.foreign import PREFIX, Foreign, Known, clip_of

devices, out = int(sys.argv[1]), sys.argv[2]
clips = [clip_of(seed) for seed in range(3)]
known = Known(clips)
memory = MemoryRetrieval(clips, prefix_frames=PREFIX, estimator=known)
callbacks = [memory, ActionFollowing(clips, estimator=known)]
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False, max_epochs=1,
    callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(Foreign())
if trainer.is_global_zero:
    json.dump({k: float(v) for k, v in trainer.callback_metrics.items()}, open(out, "w"))
"""


@pytest.mark.slow
def test_two_processes_score_what_one_does(tmp_path):
    import json

    (tmp_path / "fit.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    found = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        command = [sys.executable, str(tmp_path / "fit.py"), str(devices), str(out)]
        subprocess.run(command, check=True, env=env, timeout=240, cwd=tmp_path)
        found.append(json.loads(out.read_text()))
    one, two = found
    assert one.keys() == two.keys() and one["memory/clips"] == 3
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
