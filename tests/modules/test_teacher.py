import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from relic.modules import TeacherExtension
from relic.nn.checkpoints import WeightsSource
from relic.nn.denoiser import EulerSampler
from relic.nn.dit import DiT
from relic.nn.tensor_files import TensorsInMemory
from relic.nn.wan_layout import write_public
from relic.ops.actions import mirror_actions
from relic.ops.flow import velocity_of
from relic.types import Batch, Clip
from tests.bundles import image_of, vae_of
from tests.worlds import NANO, NANO_CLIP, NANO_WORDS, LatentWorld, batch


def teacher(**changes: object) -> TeacherExtension:
    settings = {
        "net": NANO, "clip": NANO_CLIP, "words": NANO_WORDS, "ema_decay": 0.9,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3), **changes,
    }  # fmt: skip
    return TeacherExtension(**settings)  # type: ignore[arg-type]


def trainer(root: Path, **changes: object) -> Trainer:
    settings: dict = {
        "accelerator": "cpu", "max_steps": 6, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": root, "use_distributed_sampler": False, **changes,
    }  # fmt: skip
    return Trainer(**settings)


def test_it_fits_from_python_with_a_foreign_data_module(tmp_path):
    module, data = teacher(), LatentWorld(batches=60)
    fixed = batch(list(range(8)))
    before = torch.stack(list(module.bucket_losses(fixed).values())).mean()
    trainer(tmp_path, max_steps=60).fit(module, data)
    after = torch.stack(list(module.bucket_losses(fixed).values())).mean()
    assert after < 0.9 * before
    assert (tmp_path / "teacher.safetensors").is_file()


def test_a_subclass_overrides_only_the_loss(tmp_path):
    class FirstFrames(TeacherExtension):
        def denoising_loss(self, net, batch: Batch, **kwargs):
            return super().denoising_loss(
                net, batch._replace(latents=batch.latents[:, :2], actions=batch.actions[:, :5]), **kwargs
            )

    module = FirstFrames(net=NANO, clip=NANO_CLIP, words=NANO_WORDS)
    trainer(tmp_path).fit(module, LatentWorld())
    assert torch.isfinite(module.bucket_losses(batch([0]))["0.00-0.25"])


class Recorder(torch.nn.Module):
    """Stands in for the network to see what it is given; answers zero velocity."""

    def forward(self, latents, *, sigma, text, controls, drop_text=None):
        self.latents, self.sigma, self.controls, self.drop_text = latents, sigma, controls, drop_text
        return torch.zeros_like(latents)


def test_the_first_latent_is_clean_at_level_zero_and_out_of_the_loss():
    module, recorder, data = teacher(), Recorder(), batch([0, 1])
    sigma = torch.tensor([0.7, 0.2])
    loss = module.denoising_loss(recorder, data, sigma=sigma, purpose="noise")
    assert torch.equal(recorder.latents[:, 0], data.latents[:, 0])
    assert recorder.sigma[:, 0].tolist() == [0, 0]
    assert torch.equal(recorder.sigma[:, 1:], sigma[:, None].expand(2, 2))
    noise = module.normal(data.key, "noise", like=data.latents)
    torch.testing.assert_close(loss, velocity_of(data.latents, noise)[:, 1:].square().mean((1, 2, 3, 4)))


def test_clean_latents_of_a_prefix_are_given_and_out_of_the_loss():
    module, recorder, data = teacher(), Recorder(), batch([0, 1])
    sigma = torch.tensor([0.7, 0.2])
    loss = module.denoising_loss(recorder, data, sigma=sigma, purpose="noise", prefix=torch.tensor([1, 2]))
    assert torch.equal(recorder.sigma, torch.tensor([[0, 0.7, 0.7], [0, 0, 0.2]]))
    assert torch.equal(recorder.latents[1, :2], data.latents[1, :2])
    error = (module.normal(data.key, "noise", like=data.latents) - data.latents).square().mean((2, 3, 4))
    torch.testing.assert_close(loss, torch.stack([error[0, 1:].mean(), error[1, 2]]))


def test_prefixes_are_drawn_at_the_stated_rate_and_leave_something_to_do():
    data = batch(list(range(400)))
    assert teacher().draw_prefix(data) is None
    drawn = teacher(prefix_share=0.5).draw_prefix(data)
    assert sorted(set(drawn.tolist())) == [1, 2]  # of three latents
    assert 0.17 < (drawn == 2).float().mean() < 0.33  # half of the half
    assert torch.equal(teacher(prefix_share=0.5).draw_prefix(batch([7])), drawn[7:8])
    module, recorder = teacher(prefix_share=1.0), Recorder()
    module.configure_model()
    module.net, module.log = recorder, lambda *a, **k: None
    module.training_step(data, 0)
    assert torch.equal((recorder.sigma == 0).sum(1), module.draw_prefix(data))


def test_noise_and_levels_depend_on_the_sample_not_on_its_batch():
    module, recorder = teacher(), Recorder()
    losses = {}
    for indices in ([0, 1, 2, 3], [2], [3, 0]):
        data = batch(indices)
        sigma = module.uniform(data.key, "sigma")
        loss = module.denoising_loss(recorder, data, sigma=sigma, purpose="noise")
        for index, value in zip(indices, loss, strict=True):
            assert losses.setdefault(index, value) == value


def test_prompts_are_dropped_at_the_stated_rate():
    module, recorder = teacher(prompt_dropout=0.25), Recorder()
    module.configure_model()
    module.net, module.log = recorder, lambda *a, **k: None
    dropped = []
    for start in range(0, 400, 100):
        module.training_step(batch(list(range(start, start + 100))), 0)
        dropped.append(recorder.drop_text.float().mean())
    assert 0.18 < float(torch.stack(dropped).mean()) < 0.32


def test_a_dropped_prompt_is_the_empty_prompt():
    module = teacher()
    net = module.trained
    torch.nn.init.normal_(net.words.weight)
    embedded = net.embed(batch([0]).text, drop=torch.tensor([True]))
    assert torch.equal(embedded, net.embed(torch.zeros_like(batch([0]).text))) and not embedded.any()


def test_mirrored_actions_give_other_losses_once_trained(tmp_path):
    module = teacher()
    trainer(tmp_path, max_steps=10).fit(module, LatentWorld())
    data = batch(list(range(4)))
    mirrored = data._replace(actions=mirror_actions(data.actions))
    assert module.bucket_losses(data) != module.bucket_losses(mirrored)


def test_the_sampler_solves_a_linear_flow_exactly_and_keeps_the_image():
    target = torch.randn(1, 3, 4, 2, 2)

    class Straight(torch.nn.Module):
        def forward(self, xt, *, sigma, text, controls, drop_text=None):
            level = sigma[:, :, None, None, None].clamp(min=1e-6)
            return (xt - target) / level * (sigma > 0)[:, :, None, None, None]

    image, noise = target[:, :1], torch.randn_like(target)
    for steps in (1, 4):
        sampler = EulerSampler(steps=steps, guidance=3.0)
        states = list(sampler.states(Straight(), noise, given=image, text=torch.zeros(1, 1), controls=None))
        assert len(states) == steps and all(torch.equal(s[:, :1], image) for s in states)
        torch.testing.assert_close(states[-1], target, atol=1e-5, rtol=0)


def test_a_teacher_of_prefixes_goes_on_from_true_frames_and_its_file_says_so(tmp_path):
    vae_of().save(tmp_path / "vae.safetensors")
    trainer(tmp_path, max_steps=1).fit(teacher(prefix_share=0.5), LatentWorld())
    files = {"path": str(tmp_path / "teacher.safetensors"), "vae": str(tmp_path / "vae.safetensors")}
    module = TeacherExtension.from_file(**files, sampler=EulerSampler(steps=2))
    c2w = torch.eye(4, dtype=torch.float64).expand(9, 4, 4)
    clip = Clip(video=image_of(frames=9), c2w=c2w, intrinsics_px=torch.ones(4), fps=16, d_bar=1.0)
    known = module.reconstruct([clip])[0][:5]
    (longer,) = module.generate([clip], prefix_frames=5, seed=0)
    assert longer.shape == clip.video.shape and (longer[:5].int() - known.int()).abs().max() <= 1
    (shorter,) = module.generate([clip], seed=0)
    assert not torch.equal(longer[5:], shorter[5:])
    with pytest.raises(ValueError, match="prefix_frames=13 exceeds the clip's 9 frames"):
        module.generate([clip], prefix_frames=13, seed=0)


def test_the_moving_average_follows_its_recurrence(tmp_path):
    module = teacher(ema_decay=0.9)
    module.configure_model()
    seen, name = [], "dit.head.head.weight"
    mean = dict(module.ema.named_parameters())[name].detach().clone().double()
    original = module.optimizer_step

    def spy(*args, **kwargs):
        original(*args, **kwargs)
        seen.append(dict(module.net.named_parameters())[name].detach().clone().double())

    module.optimizer_step = spy
    trainer(tmp_path, max_steps=5).fit(module, LatentWorld())
    for n, weight in enumerate(seen, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(dict(module.ema.named_parameters())[name].double(), mean, atol=1e-6, rtol=1e-5)


def test_the_next_stage_starts_from_the_exported_average(tmp_path):
    first = teacher()
    trainer(tmp_path).fit(first, LatentWorld())
    source = WeightsSource(path=str(tmp_path / "teacher.safetensors"))
    second = teacher(init=source, seed=9)
    second.configure_model()
    for name, value in first.averaged.state_dict().items():
        assert torch.equal(second.trained.state_dict()[name], value)


def test_a_stage_starts_from_public_weights_and_draws_what_they_lack(tmp_path):
    plain = DiT(dataclasses.replace(NANO, control=None))
    torch.nn.init.normal_(plain.head.head.weight)
    write_public(
        tmp_path / "wan", TensorsInMemory(plain.state_dict()), config=plain.config, layout="diffusers"
    )
    source = WeightsSource(path=str(tmp_path / "wan"), missing=("control", "words"))
    module = teacher(init=source)
    module.configure_model()
    for name, value in plain.state_dict().items():
        assert torch.equal(module.net.state_dict()[f"dit.{name}"], value)
    for name, value in module.net.state_dict().items():
        assert torch.equal(module.ema.state_dict()[name], value), name
    assert not any(p.requires_grad for p in module.ema.parameters())
    trainer(tmp_path, max_steps=2).fit(teacher(init=source), LatentWorld())
    with pytest.raises(ValueError, match=r"set init.missing: \[control, words\]"):
        teacher(init=WeightsSource(path=source.path)).configure_model()


def test_a_checkpoint_resumes_bit_for_bit(tmp_path):
    straight, stopped = teacher(), teacher()
    trainer(tmp_path / "a", max_steps=8).fit(straight, LatentWorld())
    first = trainer(tmp_path / "b", max_steps=4)
    first.fit(stopped, LatentWorld())
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    rest = teacher()

    class Rest(LatentWorld):
        def train_dataloader(self):
            return self.batches_from(4 * self.global_batch, 4)

    trainer(tmp_path / "c", max_steps=8).fit(rest, Rest(), ckpt_path=path)
    for name, value in straight.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


DDP_SCRIPT = """
import sys
import torch
from lightning import Callback, Trainer
from tests.modules.test_teacher import teacher
from tests.worlds import LatentWorld

devices, name, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
}

class Losses(Callback):
    values = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").double())

module = teacher(optimizer=OPTIMIZERS[name])
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=10, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=Losses(),
    use_distributed_sampler=False, default_root_dir=out,
)
trainer.fit(module, LatentWorld())
if trainer.is_global_zero:
    torch.save((torch.stack(Losses.values), module.state_dict()), f"{out}/{name}-{devices}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_processes_equal_one_over_ten_steps(tmp_path, optimizer):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT)
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), optimizer, str(tmp_path)]
        subprocess.run(command, check=True, env=env, timeout=240)
    (losses, one), (other_losses, two) = (torch.load(tmp_path / f"{optimizer}-{n}.pt") for n in (1, 2))
    assert len(losses) == 10 and float((losses - other_losses).abs().max()) <= 1e-5
    apart = max(float((one[k].double() - two[k].double()).abs().max()) for k in one)
    print(f"{optimizer}: losses within {(losses - other_losses).abs().max():.2g}, weights within {apart:.2g}")
    assert apart <= 1e-5


def test_wrong_settings_are_named(tmp_path):
    still = torch.eye(4, dtype=torch.float64).expand(9, 4, 4)
    video = torch.zeros(9, 32, 48, 3, dtype=torch.uint8)
    clip = Clip(video=video, c2w=still, intrinsics_px=torch.ones(4), fps=16, d_bar=1.0)
    with pytest.raises(ValueError, match=r"ema_decay=1\.5"):
        teacher(ema_decay=1.5)
    for wrong in ({"prefix_share": 1.5}, {"prefix_share": 0.5, "first_latent": "noised"}):
        with pytest.raises(
            ValueError, match=r"prefix_share=.* must be in \[0, 1\].*0 with first_latent: noised"
        ):
            teacher(**wrong)
    with pytest.raises(ValueError, match=r"words.width=64 must equal net.text_width=8"):
        teacher(words=type(NANO_WORDS)())
    with pytest.raises(FileNotFoundError, match="fit the stage that writes them first"):
        trainer(tmp_path).fit(
            teacher(init=WeightsSource(path=str(tmp_path / "none.safetensors"))), LatentWorld()
        )
    with pytest.raises(ValueError, match="set `vae`"):
        teacher().generate([clip], seed=0)
    with pytest.raises(ValueError, match=r"num_frames=8 must be 4k\+1"):
        teacher().generate([clip._replace(video=clip.video[:8])], seed=0)
    with pytest.raises(NotImplementedError, match="prefix_frames=5"):
        teacher().generate([clip], prefix_frames=5, seed=0)
