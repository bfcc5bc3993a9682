"""The DiT beside diffusers' WanTransformer3DModel: same weights, inputs and attention kernel; error and time.

First the parity: float32 without TF32, with diffusers' float32 sinusoid of the noise level put in, and with
our own. Then the forward pass in bfloat16, eager and compiled block by block, at Wan2.1-1.3B whole and at one
block of 14B. Rounds alternate; a ratio below 1 means that ours is faster.

    python benchmarks/dit.py --latents 21 --size 480 832
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from machine import describe_machine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from relic.nn.dit import DiT, DiTConfig
from relic.nn.wan_keys import to_diffusers
from relic.parallel import Compute, apply_compute

SHAPES = {
    "1.3B, whole": DiTConfig.wan_1b(control=None),
    "14B, one block": DiTConfig.wan_14b(control=None, depth=1),
}
# as diffusers loads them
KEPT_IN_FLOAT32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=21)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 832])
    parser.add_argument("--parity_latents", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, help="another depth, to try the script on a small machine")
    parser.add_argument("--width", type=int, help="another width, likewise (heads of 128)")
    args = parser.parse_args()
    print(describe_machine())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, config in SHAPES.items():
        sizes: dict[str, Any] = {"depth": args.depth} if args.depth else {}
        if args.width:
            sizes |= {"width": args.width, "heads": args.width // 128, "ffn": 4 * args.width}
        config = DiTConfig(**{**vars(config), **sizes})
        with device:
            ours = randomised(config)
            theirs = diffusers_twin(ours)
        parity(name, ours, theirs, latents=args.parity_latents, size=args.size)
        speed(name, ours, theirs, latents=args.latents, size=args.size, rounds=args.rounds)
        del ours, theirs
        torch.cuda.empty_cache()


def randomised(config: DiTConfig) -> DiT:
    """Return a network whose every layer does something, of sane magnitude."""
    torch.manual_seed(0)
    net = DiT(config).requires_grad_(False)
    nn.init.normal_(net.head.head.weight, std=config.width**-0.5)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return net


def diffusers_twin(net: DiT) -> Any:
    """Return diffusers' network with the same weights."""
    from diffusers import WanTransformer3DModel

    config = net.config
    twin = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=config.heads, attention_head_dim=config.head_width,
        in_channels=config.latent_channels, out_channels=config.latent_channels, text_dim=config.text_width,
        freq_dim=config.freq_width, ffn_dim=config.ffn, num_layers=config.depth, cross_attn_norm=True,
    ).requires_grad_(False)  # fmt: skip
    twin.load_state_dict({to_diffusers(key): value for key, value in net.state_dict().items()})
    return twin.eval()


def batch(config: DiTConfig, *, latents: int, size: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return inputs on the default device; one noise level for the clip, as diffusers takes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, latents, config.latent_channels, size[0] // 8, size[1] // 8)
    return {
        "latents": torch.randn(shape, generator=generator, device=device, dtype=dtype),
        "sigma": torch.full((1, latents), 0.437, device=device),
        "text": torch.randn(
            1, config.text_length, config.text_width, generator=generator, device=device, dtype=dtype
        ),
    }


def call_twin(twin: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = twin(
        rearrange(inputs["latents"], "b t c h w -> b c t h w"),
        timestep=1000 * inputs["sigma"][:, 0],
        encoder_hidden_states=inputs["text"],
        return_dict=False,
    )[0]
    return rearrange(out, "b c t h w -> b t c h w")


@torch.no_grad()
def parity(name: str, ours: DiT, theirs: Any, *, latents: int, size: list[int]) -> None:
    """Print the largest difference over the largest value, in float32."""
    inputs = batch(ours.config, latents=latents, size=size, dtype=torch.float32)
    expected = call_twin(theirs, inputs)
    own = ours.sinusoid
    steps = theirs.condition_embedder.timesteps_proj
    errors = []
    for sinusoid in (lambda sigma: steps(1000 * sigma.flatten()).unflatten(0, sigma.shape), own):
        ours.sinusoid = sinusoid  # type: ignore[method-assign]
        errors.append(float((ours(**inputs) - expected).abs().max() / expected.abs().max()))
    print(
        f"{name}: float32, {latents} latents, max difference / max value "
        f"{errors[0]:.1e} with diffusers' sinusoid, {errors[1]:.1e} with ours",
        flush=True,
    )


@torch.no_grad()
def speed(name: str, ours: DiT, theirs: Any, *, latents: int, size: list[int], rounds: int) -> None:
    """Print the median time of a forward pass of both, eager and compiled."""
    ours.to(torch.bfloat16)
    for key, value in (*theirs.named_parameters(), *theirs.named_buffers()):
        if not any(part in key for part in KEPT_IN_FLOAT32):
            value.data = value.data.to(torch.bfloat16)
    inputs = batch(ours.config, latents=latents, size=size, dtype=torch.bfloat16)
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            start = time.monotonic()
            theirs.compile_repeated_blocks()
            apply_compute(ours, Compute(compile_blocks=True))
        sides: dict[str, Callable[[], Tensor]] = {
            "float32 residual": lambda: run(ours, "float32", inputs),
            "bfloat16 residual": lambda: run(ours, "bfloat16", inputs),
            "diffusers": lambda: call_twin(theirs, inputs),
        }
        times = timed(sides, rounds=rounds)
        if mode == "compiled":
            print(f"{name}: compiled and timed in {time.monotonic() - start:.0f} s")
        for side in ("float32 residual", "bfloat16 residual"):
            ratios = [a / b for a, b in zip(times[side], times["diffusers"], strict=True)]
            print(
                f"{name}, {mode}, {side}: {statistics.median(times[side]):.1f} ms, diffusers "
                f"{statistics.median(times['diffusers']):.1f} ms, ratio {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


def run(net: DiT, residual: str, inputs: dict[str, Tensor]) -> Tensor:
    net.residual = getattr(torch, residual)
    return net(**inputs)


def timed(sides: dict[str, Callable[[], Tensor]], *, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each side, round by round, after two rounds of warming up."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        for number in range(rounds + 2):
            for side, forward in sides.items():
                milliseconds = stopwatch(forward)
                if number >= 2:
                    times[side].append(milliseconds)
    return times


def stopwatch(forward: Callable[[], Tensor]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        forward()
        return 1e3 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    forward()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


if __name__ == "__main__":
    main()
