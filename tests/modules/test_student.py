import pytest
import torch

from relic.modules.base import adamw
from relic.modules.student import StudentModule
from relic.nn.student import FewSteps, StudentConfig
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.randomness import clip_key
from relic.ops.retention import Compressed, Window
from relic.parallel import Compute
from relic.rollout import KeyedNoise
from relic.types import Clip, ClipSpec
from tests.data.recordings import smooth_path
from tests.worlds import NANO, NANO_CLIP, NANO_WORDS, batch

CLIP = ClipSpec(height=32, width=48, horizons=(17,), block_latents=2)  # 5 latents
SETTINGS = {
    "net": NANO, "clip": CLIP, "words": NANO_WORDS, "vae": None,
    "policy": Compressed(window=2, schedule=(1, 2)), "sampler": FewSteps(steps=2), "compute": Compute(),
    "cuda_graphs": False,
    "init": None, "optimizer": adamw, "warmup_steps": 0, "ema_decay": None, "seed": 0,
}  # fmt: skip


class Plain(StudentModule):
    stage = "plain"


def student(**changes: object) -> Plain:
    module = Plain(**{**SETTINGS, **changes})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in module.trained.parameters():  # fresh outputs are zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def clip(frames: int = 17, *, seed: int = 0) -> Clip:
    video = torch.randint(256, (frames, 32, 48, 3), generator=torch.Generator().manual_seed(seed))
    path = smooth_path(frames, seed=seed)
    return Clip(video.to(torch.uint8), path, torch.ones(4), 16.0, d_bar=0.1, captions=("a red room",))


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = TinyVAEConfig(latent_channels=4, patch=8, widths=(8,), encoder_depths=(1,), decoder_depths=(1,))
    path = tmp_path_factory.mktemp("vae") / "tiny_vae.safetensors"
    TinyVAE(config).save(path)
    return str(path)


def test_the_header_of_its_file_rebuilds_it():
    module = student()
    assert StudentConfig.from_header(module.export_config()) == module.student
    assert (module.clip, module.net_config) == (CLIP, NANO)


def test_a_clip_is_generated_from_its_prefix_and_what_follows_depends_on_actions_and_seed(vae):
    module, (one, other) = student(vae=vae), (clip(), clip(seed=1))
    mixed = one._replace(c2w=torch.cat([one.c2w[:9], one.c2w[8] @ other.c2w[8].inverse() @ other.c2w[9:]]))
    for prefix in (1, 9):
        (video,) = module.generate([one], prefix_frames=prefix, seed=0)
        assert video.shape == (17, 32, 48, 3) and video.dtype == torch.uint8
        frames = one.video[:prefix].permute(0, 3, 1, 2)[None] / 127.5 - 1
        known = module.frozen_vae.decode(module.frozen_vae.encode(frames))[0].permute(0, 2, 3, 1)
        assert (video[:prefix].float() / 127.5 - 1 - known.clamp(-1, 1)).abs().max() < 0.01
        (turned,) = module.generate([mixed], prefix_frames=prefix, seed=0)
        assert torch.equal(turned[:9], video[:9]) and not torch.equal(turned[9:], video[9:])
        (reseeded,) = module.generate([one], prefix_frames=prefix, seed=1)
        assert torch.equal(reseeded[:prefix], video[:prefix]) and not torch.equal(reseeded, video)


@pytest.mark.parametrize("known", [1, 3])
def test_a_sample_is_the_rollout_of_its_key_behind_its_prefix(vae, known):
    module, one = student(vae=vae), clip()
    noise = KeyedNoise((clip_key(one, seed=5),), ("generate",))
    seen = {}
    original = module.extend
    module.extend = lambda prefix, **given: seen.update(given, prefix=prefix) or original(prefix, **given)  # type: ignore[method-assign]
    module.generate([one], prefix_frames=4 * known - 3, seed=5)
    assert seen["noise"] == noise
    latents = original(**seen)
    rollout, at = module.rollout(module.averaged, noise=noise, like=seen["prefix"]), 4 * known - 3
    rollout.prefill(seen["prefix"], seen["actions"][:, :at], text=seen["text"])
    first = rollout.step(seen["actions"][:, at : at + 8], text=seen["text"])
    assert seen["prefix"].shape[1] == known and torch.equal(latents[:, :known], seen["prefix"])
    assert torch.equal(first.latents, latents[:, known : known + 2])


def test_clean_latents_are_the_end_of_a_solution():
    states = torch.randn(2, 3, 5, 4, 4, 6).half()
    data = batch([0, 1])._replace(latents=None, trajectory=states)
    assert torch.equal(student().clean_latents(data), states[:, 2].float())


def test_a_batch_is_sampled_from_its_first_latents_by_its_keys(vae):
    module = student(vae=vae)
    data = batch([0, 1])._replace(latents=torch.randn(2, 5, 4, 4, 6), actions=torch.rand(2, 17, 13))
    videos = module.predict_step(data, 0)
    assert videos.shape == (2, 17, 32, 48, 3) and videos.dtype == torch.uint8
    for row in range(2):
        alone = type(data)(*(None if x is None else x[row : row + 1] for x in data))
        apart = module.predict_step(alone, 0)[0].int() - videos[row].int()
        assert apart.abs().max() <= 1  # a batch rounds otherwise
    assert not torch.equal(module.predict_step(data._replace(key=data.key + 1), 0), videos)


def test_what_does_not_fit_is_named(vae):
    module = student(vae=vae)
    for prefix, message in (
        (4, r"num_frames=4 must be 4k\+1"),
        (5, "use 1 or 3"),
        (21, "exceeds the clip's 17"),
    ):
        with pytest.raises(ValueError, match=message):
            module.generate([clip()], prefix_frames=prefix, seed=0)
    with pytest.raises(ValueError, match="25 frames are 7 latents, more than the 5 of the longest"):
        module.generate([clip(25)], seed=0)
    with pytest.raises(ValueError, match="set `vae`"):
        student().generate([clip()], seed=0)
    with pytest.raises(ValueError, match="multiple of block_latents=2"):
        student(policy=Window(latents=3), clip=NANO_CLIP)
