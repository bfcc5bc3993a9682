import pytest
import torch

from relic.nn.dit import DiT, DiTConfig
from relic.nn.tensor_files import Stored
from relic.nn.wan_keys import layout_of, sizes_of, to_diffusers, to_original, unwrapped


def on_meta(config: DiTConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return DiT(config).state_dict()


@pytest.mark.parametrize(
    ("config", "tensors", "layers", "heads", "ffn"),
    [
        (DiTConfig.wan_1b(control=None), 825, 30, 12, 8960),
        (DiTConfig.wan_14b(control=None), 1095, 40, 40, 13824),
    ],
)
def test_names_and_shapes_are_those_of_diffusers_at_the_public_sizes(config, tensors, layers, heads, ffn):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn)
    ours = on_meta(config)
    renamed = {to_diffusers(name): tensor.shape for name, tensor in ours.items()}
    assert renamed == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(renamed) == len(ours) == tensors
    assert [to_original(name) for name in renamed] == list(ours)


def test_the_head_keeps_its_modulation_apart_from_the_blocks():
    assert to_diffusers("head.modulation") == "scale_shift_table"
    assert to_diffusers("blocks.3.modulation") == "blocks.3.scale_shift_table"
    assert to_original("blocks.3.norm2.weight") == "blocks.3.norm3.weight"


def test_a_name_that_is_not_of_plain_wan_has_no_other():
    assert to_original("condition_embedder.image_embedder.norm1.weight").startswith("condition_embedder")
    for name in ("control.action.0.weight", "blocks.0.control.action.weight", "blocks.0.norm1.weight"):
        with pytest.raises(ValueError, match=f"{name} has no name in diffusers"):
            to_diffusers(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "model._orig_mod.blocks.0._checkpoint_wrapped_module._orig_mod.ffn.0.weight",
    ],
)
def test_wrappers_leave_no_trace_in_a_name(name):
    assert unwrapped(name) == "blocks.0.ffn.0.weight"


def test_sizes_are_read_off_the_tensors():
    entries = {k: Stored(tuple(v.shape), v.dtype) for k, v in on_meta(DiTConfig.wan_1b(control=None)).items()}
    sizes = sizes_of(entries)
    assert sizes == (1536, 30, 8960, 16, 4096, 256) and sizes.name == "Wan2.1 T2V-1.3B"
    del entries["patch_embedding.weight"]
    assert sizes_of(entries) is None


@pytest.mark.parametrize(
    ("names", "meaning"),
    [
        (["blocks.0.self_attn.q.weight", "img_emb.proj.0.weight"], "an image-to-video Wan checkpoint"),
        (["blocks.0.attn1.to_q.weight", "blocks.0.attn2.add_k_proj.weight"], "an image-to-video Wan"),
        (["blocks.0.self_attn.q.weight", "vace_blocks.0.self_attn.q.weight"], "a Wan VACE checkpoint"),
        (["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.scale_weight"], "a quantised checkpoint"),
        (["blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
        (["encoder.conv1.weight", "decoder.upsamples.0.residual.0.gamma"], r"the Wan VAE \(original names\)"),
        (["encoder.down_blocks.0.conv1.weight"], "a diffusers VAE"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "a T5 text encoder"),
        (["visual.head"], "a CLIP image encoder"),
        (["double_blocks.0.img_attn_q.weight"], "a diffusion transformer of another family"),
    ],
)
def test_another_checkpoint_is_called_by_its_name(names, meaning):
    with pytest.raises(ValueError, match=f"x.pth looks like {meaning}.*Give a text-to-video Wan2.1 DiT"):
        layout_of(names, path="x.pth")


def test_an_unknown_checkpoint_shows_some_of_its_names():
    with pytest.raises(ValueError, match=r"holds 2 tensors named a\.b, c\.d, which is no Wan2.1 DiT"):
        layout_of(["c.d", "a.b"], path="x.pth")
