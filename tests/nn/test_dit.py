import dataclasses

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relic.nn.control import ControlConfig
from relic.nn.dit import DiT, DiTConfig
from relic.ops.actions import controls_of, null_controls
from relic.ops.camera import pose_features, rigid, rotation_from_angles
from relic.parallel import Compute, apply_compute
from relic.types import Controls
from tests.data.recordings import smooth_path
from tests.reference import dit as reference

SMALL = DiTConfig(
    width=48, depth=2, heads=2, ffn=96, latent_channels=4, text_width=12, text_length=6, control=None
)


def randomised(config: DiTConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> DiT:
    torch.manual_seed(seed)
    net = DiT(config).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(*, latents: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    sigma = torch.rand(2, latents, generator=generator, dtype=dtype)
    sigma[:, 0] = 0
    return {"latents": draw(2, latents, 4, 4, 6), "sigma": sigma, "text": draw(2, 5, 12)}


def some_actions(frames: int = 9) -> torch.Tensor:
    return torch.rand(2, frames, 13, generator=torch.Generator().manual_seed(2))


def test_the_network_equals_a_plain_loop_over_tokens_in_float64():
    net, batch = randomised(SMALL), inputs()
    out = net(**batch)
    for i in range(2):
        truth = reference.forward(
            net.state_dict(), rearrange(batch["latents"][i], "t c h w -> c t h w"), batch["sigma"][i],
            batch["text"][i], heads=2, depth=2, text_length=6,
        )  # fmt: skip
        assert (rearrange(out[i], "t c h w -> c t h w") - truth).abs().max() <= 1e-10 * truth.abs().max()


RAYS = ControlConfig(width=8, poses=False, rays=0.75, inverse_depths=(0.2, 0.0))


def seeing(path: torch.Tensor) -> Controls:
    """Return controls of two clips that fly a path (2, f, 4, 4) in d̄, and do nothing but see."""
    return Controls(actions=torch.zeros(2, path.shape[1], 13).double(), poses=pose_features(path).double())


def test_rays_equal_a_plain_loop_over_tokens_and_heads():
    plain, batch = randomised(SMALL), inputs()
    net = DiT(dataclasses.replace(SMALL, control=RAYS)).double()  # fresh actions add nothing
    net.load_state_dict(plain.state_dict(), strict=False)
    path = torch.stack([smooth_path(9, seed=seed) for seed in (0, 1)])
    out = net(**batch, controls=seeing(path))
    for i in range(2):
        poses = pose_features(path[i]).double()  # as rounded on the way
        c2w = [rigid_of(pose) for pose in poses]
        rays = {
            "poses": [[c2w[0]], c2w[1:5], c2w[5:9]], "view": (0.75, 0.5), "inverse_depths": (0.2, 0.0),
        }  # fmt: skip
        truth = reference.forward(
            plain.state_dict(), rearrange(batch["latents"][i], "t c h w -> c t h w"), batch["sigma"][i],
            batch["text"][i], heads=2, depth=2, text_length=6, rays=rays,
        )  # fmt: skip
        assert (rearrange(out[i], "t c h w -> c t h w") - truth).abs().max() <= 1e-10 * truth.abs().max()
    assert (out - net(**batch, controls=None)).abs().max() > 1e-2 * out.abs().max()


def rigid_of(pose: torch.Tensor) -> torch.Tensor:
    """Return c2w (4, 4) of pose features (9,)."""
    right, down = pose[3:6], pose[6:9]
    rotation = torch.stack([right, down, torch.linalg.cross(right, down)], dim=-1)
    return rigid(rotation, 8 * pose[:3])


def test_with_rays_a_clip_may_be_anywhere_but_not_look_anywhere():
    net, batch = randomised(dataclasses.replace(SMALL, control=RAYS)), inputs()
    path = torch.stack([smooth_path(9, seed=seed) for seed in (0, 1)])
    here = net(**batch, controls=seeing(path))
    moved, turned = path.clone(), path.clone()
    moved[..., :3, 3] += torch.tensor([4.0, -2.0, 9.0])
    there = net(**batch, controls=seeing(moved))
    assert (there - here).abs().max() <= 1e-5 * here.abs().max()
    turned[:, 5:, :3, :3] = turned[:, 5:, :3, :3] @ rotation_from_angles(
        torch.tensor([20.0, 0.0, 0.0]).double()
    )
    assert (net(**batch, controls=seeing(turned)) - here).abs().max() > 1e-2 * here.abs().max()


@pytest.mark.parametrize(("sinusoid", "tolerance"), [("theirs", 1e-5), ("ours", 1e-4)])
def test_the_network_equals_diffusers_with_copied_weights(sinusoid, tolerance):
    diffusers = pytest.importorskip("diffusers")
    net = randomised(SMALL, dtype=torch.float32)
    other = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=12, freq_dim=256, ffn_dim=96, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    other.load_state_dict({diffusers_name(k): v for k, v in net.state_dict().items()})
    if sinusoid == "theirs":  # computed in float32, whose rounding the time MLP amplifies; ours is float64
        steps = other.condition_embedder.timesteps_proj
        net.sinusoid = lambda sigma: steps(1000 * sigma.flatten()).unflatten(0, sigma.shape)
    batch = inputs(dtype=torch.float32)
    level = torch.full_like(batch["sigma"], 0.437)  # diffusers takes one level per sample here
    ours = net(**{**batch, "sigma": level})
    padded = nn.functional.pad(batch["text"], (0, 0, 0, 1))
    theirs = other(
        rearrange(batch["latents"], "b t c h w -> b c t h w"),
        timestep=level[:, 0] * 1000,
        encoder_hidden_states=padded,
    ).sample
    error = (rearrange(theirs, "b c t h w -> b t c h w") - ours).abs().max() / ours.abs().max()
    assert error <= tolerance


def diffusers_name(key: str) -> str:
    renames = {
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
        ".modulation": ".scale_shift_table",
        "self_attn": "attn1",
        "cross_attn": "attn2",
        ".norm3.": ".norm2.",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }
    for ours, theirs in renames.items():
        key = key.replace(ours, theirs)
    for letter in "qkv":
        key = key.replace(f".{letter}.", f".to_{letter}.")
    return key.replace(".o.", ".to_out.0.")


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (DiTConfig.wan_1b(control=None), 1_418_996_800, 825),
        (DiTConfig.wan_14b(control=None), 14_288_491_584, 1095),
    ],
)
def test_public_sizes_have_the_public_number_of_parameters_and_tensors(config, parameters, tensors):
    with torch.device("meta"):
        net = DiT(config)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors


def test_fresh_controls_change_no_bit():
    plain = randomised(SMALL, dtype=torch.float32)
    controlled = DiT(dataclasses.replace(SMALL, control=ControlConfig(width=8)))
    missing, unexpected = controlled.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("control" in key for key in missing)
    batch = inputs(dtype=torch.float32)
    assert torch.equal(plain(**batch), controlled(**batch, controls=controls_of(some_actions())))


def test_controls_change_the_output_once_trained_and_poses_act_apart_from_actions():
    net = randomised(dataclasses.replace(SMALL, control=ControlConfig(width=8)))
    actions, batch = some_actions().double(), inputs()
    full, none = net(**batch, controls=controls_of(actions)), net(**batch, controls=None)
    no_pose = net(**batch, controls=controls_of(actions)._replace(poses=None))
    null = net(**batch, controls=null_controls(actions))
    outputs = [full, none, no_pose, null]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_each_latent_frame_reads_its_own_noise_level():
    net, batch = randomised(SMALL), inputs()
    changed = batch["sigma"].clone()
    changed[:, 2] = 0.9
    a, b = net.embed_levels(batch["sigma"]), net.embed_levels(changed)
    for before, after in zip(a, b, strict=True):
        assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2], after[:, 2])


@pytest.mark.parametrize("keep", ["products", "attention", "inputs"])
def test_activation_checkpointing_keeps_values_gradients_and_names(keep):
    plain, saving = randomised(SMALL), randomised(SMALL)
    names = list(plain.state_dict())
    apply_compute(saving, Compute(keep=keep))
    assert list(saving.state_dict()) == names
    for net in (plain, saving):
        net(**inputs()).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """FLOPs from shapes (b, k, n, d); the counter does not know this kernel."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def test_what_is_kept_is_not_computed_again():
    operations = {}
    for keep in ("all", "products", "attention", "inputs"):
        net, batch = randomised(SMALL, dtype=torch.float32), inputs(dtype=torch.float32)
        apply_compute(net, Compute(keep=keep))
        with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops}) as counter:
            net(**batch).square().sum().backward()
        operations[keep] = counter.get_total_flops()
    tokens, prompt, width = 2 * 3 * 2 * 3, 2 * 6, SMALL.width
    widening = 2 * tokens * width * SMALL.ffn
    others = widening + 2 * width**2 * (6 * tokens + 2 * prompt)  # q, k, v, o; q, o and k, v of the prompt
    looking, reading = 4 * width * tokens * tokens // 2, 4 * width * tokens * prompt // 2  # two clips
    again = {keep: (operations[keep] - operations["all"]) // SMALL.depth for keep in operations}
    expected = {"all": 0, "products": widening, "attention": widening + others + reading}
    assert again == {**expected, "inputs": widening + others + reading + looking}


def test_a_half_precision_residual_stream_stays_near_the_exact_one():
    net = randomised(SMALL, dtype=torch.float32).to(torch.bfloat16)
    batch = inputs(dtype=torch.float32)
    exact = randomised(SMALL, dtype=torch.float32)(**batch)
    errors = {}
    for residual in ("float32", "bfloat16"):
        apply_compute(net, Compute(residual=residual))
        errors[residual] = (net(**batch) - exact).norm() / exact.norm()
    assert errors["float32"] < errors["bfloat16"] < 0.05


def test_wrong_inputs_are_named():
    net, batch = randomised(SMALL), inputs()
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        net(**{**batch, "sigma": batch["sigma"][:, 0]})
    with pytest.raises(ValueError, match="up to 6 rows of width 12"):
        net(**{**batch, "text": torch.zeros(2, 7, 12, dtype=torch.float64)})
    with pytest.raises(ValueError, match="2x2 patches"):
        net(**{**batch, "latents": batch["latents"][..., :5]})
    with pytest.raises(ValueError, match="8 frames of control"):
        DiT(dataclasses.replace(SMALL, control=ControlConfig(width=8))).double()(
            **batch, controls=controls_of(some_actions(8))
        )
    with pytest.raises(ValueError, match="width=50"):
        dataclasses.replace(SMALL, width=50, heads=4)


@pytest.mark.slow
@pytest.mark.parametrize("control", [None, RAYS], ids=["plain", "rays"])
def test_compiled_blocks_share_one_graph_and_change_little_with_checkpointing_inside(control):
    counters = torch._dynamo.utils.counters
    results = []
    for plan in (Compute(), Compute(keep="products", compile_blocks=True)):
        torch.compiler.reset()
        counters.clear()
        config = dataclasses.replace(SMALL, control=control)
        net, batch = randomised(config, dtype=torch.float32), inputs(dtype=torch.float32)
        apply_compute(net, plan)
        out = net(**batch, controls=controls_of(some_actions()) if control else None)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for plain, compiled in zip(*results, strict=True):
        assert (plain - compiled).norm() <= 1e-4 * plain.norm()
