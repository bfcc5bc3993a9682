"""The autoencoder stage: it learns, normalises its latents, and ranks only share the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from relic.modules import Autoencoder
from relic.modules.autoencoder import detail_loss, edge_loss
from relic.nn.checkpoints import read_header
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.randomness import derive_seed, keyed_generator
from relic.ops.video import from_uint8
from relic.types import Batch, ClipSpec

NET = TinyVAEConfig(latent_channels=8, patch=4, widths=(12, 16), encoder_depths=(1, 1), decoder_depths=(1, 1))
CLIP = ClipSpec(height=32, width=48, horizons=(9,), block_latents=2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def autoencoder(**changes) -> Autoencoder:
    settings = {"net": NET, "clip": CLIP, "ema_decay": 0.9, **changes}
    return Autoencoder(**settings)


def batch(indices: list[int]) -> Batch:
    """Soft stripes that wander; every sample is a function of its index."""
    videos = []
    for index in indices:
        a, b, c, *colour = torch.rand(6, generator=keyed_generator("stripes", index)).tolist()
        t, y, x = torch.meshgrid(torch.arange(9), torch.arange(32), torch.arange(48), indexing="ij")
        wave = ((x * a + y * b + t * c) * 0.4).sin()
        videos.append((127 + 120 * wave[:, None] * torch.tensor(colour)[:, None, None]).to(torch.uint8))
    count = len(indices)
    return Batch(
        latents=None,
        trajectory=None,
        video=torch.stack(videos),
        actions=torch.zeros(count, 9, 13),
        text=torch.zeros(count, 4, dtype=torch.int64),
        d_bar=torch.ones(count, dtype=torch.float64),
        key=torch.tensor([derive_seed(0, i) for i in indices]),
    )


class Stripes(lightning.LightningDataModule):
    """Ranks take strided slices of each global batch of four."""

    def __init__(self, *, batches: int = 4) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        mine = range(self.trainer.global_rank, 4, self.trainer.world_size)
        rows = [batch([4 * n + j for j in mine]) for n in range(self.batches)]
        return DataLoader(rows, batch_size=None)

    def val_dataloader(self):
        return DataLoader([batch([1000, 1001])], batch_size=None)


def trainer(root: Path, **changes) -> Trainer:
    settings = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": root,
        "use_distributed_sampler": False, **changes,
    }  # fmt: skip
    return Trainer(**settings)


def test_fitting_lowers_the_error_and_exports_a_normalising_vae(tmp_path):
    module = autoencoder(optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    truth = from_uint8(batch([1000, 1001]).video)
    with torch.no_grad():
        before = (module.averaged(truth) - truth).square().mean()
    run = trainer(tmp_path, max_steps=30)
    run.fit(module, Stripes(batches=30))
    vae = TinyVAE.from_file(tmp_path / "tiny_vae.safetensors")
    with torch.no_grad():
        after = (vae(truth) - truth).square().mean()
        latents = vae.encode(from_uint8(batch(list(range(200, 216))).video))
    assert after < 0.7 * before
    assert run.callback_metrics["val/psnr_rec"] > 15
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.5
    assert 0.5 < latents.var((0, 1, 3, 4)).mean().sqrt() < 2
    assert read_header(tmp_path / "tiny_vae.safetensors")["config"]["widths"] == [12, 16]


def test_running_moments_are_those_of_all_latents_while_they_are_few():
    module = autoencoder()
    scale = torch.linspace(0.1, 3.0, 8)[:, None, None]
    mus = [torch.randn(2, 3, 8, 4, 6) * scale + n for n in range(5)]
    for mu in mus:
        module.track_moments(mu)
    every = torch.cat(mus)
    torch.testing.assert_close(module.trained.mean, every.mean((0, 1, 3, 4)), atol=1e-5, rtol=1e-4)
    shared = every.var((0, 1, 3, 4), correction=0).mean().sqrt()
    torch.testing.assert_close(module.trained.std, shared.expand(8), atol=1e-5, rtol=1e-4)


def test_moments_and_noise_stay_out_of_the_gradient_of_other_samples():
    module = autoencoder(window_frames=5)
    losses = {}
    for indices in ([0, 1, 2], [2]):
        data = batch(indices)
        vae, video = module.trained, module.window(data)
        mu, _ = vae.moments(video)
        noise = module.normal(data.key, "posterior", like=mu)
        losses[len(indices)] = (video[-1], noise[-1], vae.render(mu + noise)[-1])
    for several, alone in zip(losses[3], losses[1], strict=True):
        torch.testing.assert_close(several, alone, atol=1e-5, rtol=0)


def test_windows_are_short_stretches_at_keyed_places():
    module = autoencoder(window_frames=5)
    data = batch(list(range(32)))
    windows, whole = module.window(data), from_uint8(data.video)
    places = [
        next(s for s in range(5) if torch.equal(window, clip[s : s + 5]))
        for window, clip in zip(windows, whole, strict=True)
    ]
    assert set(places) == set(range(5))
    assert torch.equal(windows, module.window(data))


def test_an_edge_out_of_place_costs_more_than_a_wrong_brightness():
    truth = torch.zeros(1, 1, 3, 8, 8)
    brighter = truth + 0.5
    striped = truth.clone()
    striped[..., ::2] = 0.5
    assert edge_loss(brighter, truth) == 0 < edge_loss(striped, truth)


def test_a_blurred_edge_costs_detail_and_one_out_of_place_does_not():
    truth = torch.zeros(1, 2, 3, 18, 26)
    truth[..., 12:] = 1.0
    beside, blurred = truth.roll(1, dims=-1), truth.clone()
    beside[..., 0] = 0.0
    blurred[..., 10:14] = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert detail_loss(truth, truth) == 0 and detail_loss(beside, truth) < 1e-6
    assert detail_loss(blurred, truth) > 0.05
    border = truth[0, 0].clone()
    border[:, -2:] = 0.5  # of the last rows too, and of a single picture
    assert detail_loss(border, truth[0, 0]) > 0.01


def test_what_is_learned_from_detail_reaches_flat_pictures_too():
    flat = torch.full((1, 1, 3, 16, 16), 0.3, requires_grad=True)
    detail_loss(flat, torch.rand(1, 1, 3, 16, 16)).backward()
    assert flat.grad.isfinite().all()


DDP_SCRIPT = """
import sys, torch
from tests.modules.test_autoencoder import Stripes, autoencoder, sgd, trainer
devices, out = int(sys.argv[1]), sys.argv[2]
module = autoencoder(optimizer=sgd, window_frames=5)
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=10)
run.fit(module, Stripes(batches=10))
if run.is_global_zero:
    torch.save(module.state_dict(), f"{out}/state-{devices}.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one_over_ten_steps(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    for devices in (1, 2):
        subprocess.run(
            [sys.executable, script, str(devices), str(tmp_path)], check=True, env=env, timeout=240
        )
    one, two = (torch.load(tmp_path / f"state-{n}.pt") for n in (1, 2))
    assert one["net.std"].max() < 0.9  # the moments have moved
    assert max(float((one[k].double() - two[k].double()).abs().max()) for k in one) <= 1e-5


def test_wrong_settings_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"window_frames=8 must be 4k\+1|num_frames=8 must be 4k\+1"):
        autoencoder(window_frames=8)
    with pytest.raises(ValueError, match="window_frames=13 is longer than a clip"):
        autoencoder(window_frames=13)
    with pytest.raises(ValueError, match="kl_weight=-1"):
        autoencoder(kl_weight=-1)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"alexnet.*set lpips_weight to 0"):
        autoencoder(lpips_weight=0.1)
    with pytest.raises(ValueError, match=r"set data.content to video"):
        autoencoder().window(batch([0])._replace(video=None))
