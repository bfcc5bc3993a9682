"""The small autoencoder: causal, the same in a stream as in one go, and rebuilt from its file."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relic.nn.checkpoints import save_weights
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig, fold, unfold
from relic.types import latents_of

NANO = TinyVAEConfig(
    latent_channels=4, patch=2, widths=(8, 12, 16), encoder_depths=(1, 2, 1), decoder_depths=(1, 1, 2)
)
FRAMES = 17


def nano(config: TinyVAEConfig = NANO, *, dtype: torch.dtype = torch.float64) -> TinyVAE:
    """A network whose every weight and statistic matters; fresh blocks are the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = TinyVAE(config)
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        vae.mean.normal_()
        vae.std.uniform_(0.5, 2.0)
    return vae.to(dtype).eval()


def clip(*, dtype: torch.dtype = torch.float64, frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, frames, 3, 16, 24, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize(
    "config",
    [
        NANO,
        dataclasses.replace(NANO, patch=4, widths=(8, 12), encoder_depths=(1, 1), decoder_depths=(1, 2)),
        dataclasses.replace(NANO, patch=8, widths=(12,), encoder_depths=(2,), decoder_depths=(1,)),
    ],
    ids=lambda config: f"patch {config.patch}",
)
@torch.no_grad()
def test_shapes_follow_4x8x8_at_every_patch(config):
    vae, video = nano(config), clip()
    latents = vae.encode(video)
    assert latents.shape == (2, latents_of(FRAMES), 4, 2, 3)
    assert vae.decode(latents).shape == video.shape


@torch.no_grad()
def test_a_latent_depends_on_its_own_and_earlier_frames_only():
    vae, video = nano(), clip()
    latents = vae.encode(video)
    for frame in range(FRAMES):
        changed = video.clone()
        changed[:, frame] = -changed[:, frame]
        moved = (vae.encode(changed) != latents).flatten(2).any(2).any(0)
        own = (frame + 3) // 4
        assert not moved[:own].any() and moved[own]


@torch.no_grad()
def test_a_frame_depends_on_its_own_and_earlier_latents_only():
    vae, latents = nano(), nano().encode(clip())
    video = vae.decode(latents)
    for place in range(latents.shape[1]):
        changed = latents.clone()
        changed[:, place] += 1
        moved = (vae.decode(changed) != video).flatten(2).any(2).any(0)
        own = max(0, 4 * place - 3)
        assert not moved[:own].any() and moved[own]


@torch.no_grad()
def test_an_image_encodes_as_the_first_latent_of_a_clip():
    vae, video = nano(), clip()
    assert torch.equal(vae.encode(video[:, :1]), vae.encode(video)[:, :1])


@settings(deadline=None, max_examples=10)
@given(plan=st.lists(st.integers(1, 3), min_size=1, max_size=5))
@torch.no_grad()
def test_a_stream_equals_the_whole_for_any_chunks(plan):
    vae, video = nano(), clip(frames=1 + 4 * (sum(plan) - 1))
    latents = vae.encode(video)
    whole = vae.decode(latents)
    encoding = decoding = None
    seen_latents, seen_video, frame, place = [], [], 0, 0
    for size in plan:
        frames = 4 * size - (3 if frame == 0 else 0)
        chunk, encoding = vae.encode_stream(video[:, frame : frame + frames], encoding)
        seen_latents.append(chunk)
        chunk, decoding = vae.decode_stream(latents[:, place : place + size], decoding)
        seen_video.append(chunk)
        frame, place = frame + frames, place + size
    torch.testing.assert_close(torch.cat(seen_latents, 1), latents, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat(seen_video, 1), whole, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_stream_in_float32_equals_the_whole_to_1e5():
    vae, video = nano(dtype=torch.float32), clip(dtype=torch.float32)
    first, state = vae.encode_stream(video[:, :5], None)
    rest, _ = vae.encode_stream(video[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), vae.encode(video), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_state_can_be_gone_on_from_twice():
    vae, video = nano(), clip()
    _, state = vae.encode_stream(video[:, :5], None)
    kept = [past.clone() for past in state.past]
    once, _ = vae.encode_stream(video[:, 5:9], state)
    vae.encode_stream(video[:, 9:], state)
    again, _ = vae.encode_stream(video[:, 5:9], state)
    assert torch.equal(once, again)
    assert all(map(torch.equal, kept, state.past))


@torch.no_grad()
def test_latents_are_normalised_by_the_vae_alone():
    vae, video = nano(), clip()
    mu, _ = vae.moments(video)
    column = (None, None, slice(None), None, None)
    torch.testing.assert_close(
        vae.encode(video), (mu - vae.mean[column]) / vae.std[column], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(vae.decode(vae.encode(video)), vae.render(mu).clamp(-1, 1), atol=1e-12, rtol=0)


@torch.no_grad()
def test_statistics_stay_in_float32_when_the_network_is_halved():
    vae = nano(dtype=torch.float32)
    mean, latents = vae.mean.clone(), vae.encode(clip(dtype=torch.float32))
    half = vae.bfloat16()
    assert torch.equal(half.mean, mean)
    assert (half.encode(clip(dtype=torch.float32)) - latents).abs().mean() < 0.02 * latents.std()
    assert half.decode(latents).dtype == torch.float32


def test_the_gradient_reaches_every_parameter():
    vae = nano()
    mu, logvar = vae.moments(clip())
    (vae.render(mu + logvar).square().mean()).backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_a_fresh_network_already_shows_a_smooth_video():
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 48)[:, None] * torch.linspace(-1, 1, 64)
    video = torch.stack([ramp * (1 - t / 20) for t in range(9)])[None, :, None].expand(1, 9, 3, 48, 64)
    error = (TinyVAE(TinyVAEConfig.tiny())(video) - video)[..., 8:-8, 8:-8].square().mean()
    assert error < 0.2 * video.var()


def test_fold_and_unfold_are_inverse():
    x = torch.randn(2, 4, 6, 8, 5)
    assert torch.equal(unfold(fold(x, frames=2, cells=2), frames=2, cells=2), x)


@torch.no_grad()
def test_a_file_rebuilds_the_network(tmp_path):
    vae = nano(dtype=torch.float32)
    vae.save(tmp_path / "vae.safetensors")
    again = TinyVAE.from_file(tmp_path / "vae.safetensors")
    assert again.config == NANO and not again.training
    assert torch.equal(again.encode(clip(dtype=torch.float32)), vae.encode(clip(dtype=torch.float32)))


def test_a_file_of_another_kind_or_with_missing_weights_is_refused(tmp_path):
    vae, path = nano(dtype=torch.float32), tmp_path / "vae.safetensors"
    save_weights(path, vae.state_dict(), kind="teacher", config={})
    with pytest.raises(ValueError, match="holds a teacher, but a tiny_vae is needed"):
        TinyVAE.from_file(path)
    tensors = vae.state_dict()
    del tensors["mean"]
    save_weights(path, tensors, kind="tiny_vae", config=dataclasses.asdict(NANO))
    with pytest.raises(ValueError, match="1 missing: mean"):
        TinyVAE.from_file(path)


def test_presets_have_the_stated_sizes():
    def millions(config):
        with torch.device("meta"):
            return sum(p.numel() for p in TinyVAE(config).parameters()) / 1e6

    assert millions(TinyVAEConfig()) == pytest.approx(2.3, abs=0.1)
    assert millions(TinyVAEConfig.tiny()) == pytest.approx(0.5, abs=0.05)


def test_errors_name_the_value_and_the_rule():
    vae = nano()
    with pytest.raises(ValueError, match=r"num_frames=4 must be 4k\+1.*use 1 or 5"):
        vae.encode(clip()[:, :4])
    _, state = vae.encode_stream(clip()[:, :5], None)
    with pytest.raises(ValueError, match="groups of 4 frames, got 5; use 4"):
        vae.encode_stream(clip()[:, :5], state)
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(clip()[..., :12])
    with pytest.raises(ValueError, match="c=4"):
        vae.decode(torch.zeros(1, 2, 16, 2, 3))
    with pytest.raises(ValueError, match="holds 4 blocks, this network has 3"):
        nano(dataclasses.replace(NANO, encoder_depths=(1, 1, 1))).encode_stream(clip()[:, :4], state)
    with pytest.raises(ValueError, match=r"widths=\(8, 12\) must be 3 positive numbers"):
        TinyVAEConfig(widths=(8, 12))
    with pytest.raises(ValueError, match="patch=3"):
        TinyVAEConfig(patch=3)
