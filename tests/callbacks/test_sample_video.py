import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relic.callbacks import Recordings, SampleVideo, VideoWriter
from relic.data.video import decode_video
from relic.types import Batch
from tests.data.recordings import clip_sample, write_dataset
from tests.worlds import batch


class Foreign(LightningModule):
    """Knows nothing of relic but `generate`: it shows the first frame, darkened."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.asked = []

    def generate(self, clips, *, prefix_frames=1, seed):
        self.asked.append((len(clips), prefix_frames, seed))
        return [clip.video[:1].expand_as(clip.video) // 2 for clip in clips]

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return torch.full((2, 5, 16, 16, 3), 7, dtype=torch.uint8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    val_dataloader = train_dataloader


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(
        tmp_path / "clips", [(f"r{i}", clip_sample(49, seed=i, scene=f"room{i}")) for i in range(3)]
    )


def fit(root, callback, **settings):
    logger = TensorBoardLogger(root, name="log")
    trainer = Trainer(
        accelerator="cpu", logger=logger, callbacks=callback, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=1, **settings,
    )  # fmt: skip
    module = Foreign()
    trainer.fit(module)
    return module, logger


def test_videos_of_any_module_go_to_disk_and_to_tensorboard(tmp_path, dataset):
    clips = Recordings(
        root=str(dataset), num_frames=17, split="train", validation_scenes=1, evaluation_scenes=0, seed=5
    )
    callback = SampleVideo(clips, every_n_validations=2, seed=5)
    module, logger = fit(tmp_path, callback, max_epochs=5)
    assert module.asked == [(2, 1, 5), (2, 1, 5)]  # validations 2 and 4; not the sanity check
    written = sorted((tmp_path / "samples").rglob("*.mp4"))
    assert [path.parent.name for path in written] == ["step-00000008"] * 2 + ["step-00000016"] * 2
    video = decode_video(written[0].read_bytes())
    assert video.shape[:2] == (17, 64)
    truth, sample = video[:, :, :60].mean(), video[:, :, 70:126].mean()
    assert truth > 1.5 * sample
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    images = events.Images("sample/clip-0")
    assert [image.step for image in images] == [8, 16] and images[0].encoded_image_string[:3] == b"GIF"


def test_a_module_that_cannot_generate_is_refused_before_training(tmp_path, dataset):
    class Silent(Foreign):
        generate = property()

    callback = SampleVideo(Recordings(root=str(dataset), num_frames=17))
    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=callback, default_root_dir=tmp_path,
        enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="Silent has none"):
        trainer.fit(Silent())


def test_predicted_videos_are_written_under_their_keys(tmp_path):
    class World(Foreign):
        def predict_dataloader(self):
            return torch.utils.data.DataLoader([batch([0, 1])], batch_size=None)

    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=VideoWriter(fps=16), default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.predict(World(), return_predictions=False)
    keys: Batch = batch([0, 1])
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == sorted(f"{key:019d}.mp4" for key in keys.key.tolist())
    assert decode_video((tmp_path / "predictions" / names[0]).read_bytes()).shape == (5, 16, 16, 3)


SCRIPT = """
import sys
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from relic.callbacks import Recordings, SampleVideo
from tests.callbacks.test_sample_video import Foreign

root, clips = sys.argv[1:]
held = {"validation_scenes": 0, "evaluation_scenes": 0}
callback = SampleVideo(Recordings(root=clips, num_frames=17, split="train", num_clips=3, **held))
Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=TensorBoardLogger(root, name="log"), max_steps=2,
    callbacks=callback, default_root_dir=root, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, num_sanity_val_steps=0,
).fit(Foreign())
"""


@pytest.mark.slow
def test_two_ranks_show_all_clips_once(tmp_path, dataset):
    (tmp_path / "fit.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "fit.py"), str(tmp_path), str(dataset)]
    subprocess.run(command, check=True, env=env, timeout=240)
    names = [f"clip-{i}" for i in range(3)]
    assert sorted(path.stem for path in (tmp_path / "samples").rglob("*.mp4")) == names
    shown = []
    for folder in (tmp_path / "log").iterdir():
        events = EventAccumulator(str(folder), size_guidance={"images": 0})
        events.Reload()
        shown += events.Tags()["images"]
    assert sorted(shown) == [f"sample/{name}" for name in names]
