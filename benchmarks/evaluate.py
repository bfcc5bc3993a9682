"""How long `relic evaluate` takes on a CPU for a small untrained world: playing, scoring and the report.

python benchmarks/evaluate.py --seconds 5 --scenes 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from machine import describe_machine
from sizes import small

from relic.nn.student import FewSteps, StudentConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.retention import Compressed
from relic.types import ClipSpec
from relic.verbs.evaluate import evaluate
from relic.world import World


def write_world(path: Path, *, size: tuple[int, int], frames: int) -> None:
    """Write an untrained world of small sizes."""
    torch.manual_seed(0)
    vae = TinyVAE(TinyVAEConfig.tiny()).eval().requires_grad_(False)
    net = small(latent_channels=vae.config.latent_channels)
    clip = ClipSpec(height=size[0], width=size[1], horizons=(frames,))
    config = StudentConfig(
        net=net,
        words=WordTableConfig(width=net.text_width),
        clip=clip,
        policy=Compressed(),
        sampler=FewSteps(),
    )
    student = config.build().eval().requires_grad_(False)
    World(net=student, vae=vae, config=config, d_bar=0.055, name="untrained").save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--lpips", default=None)
    words = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "untrained")
        write_world(bundle, size=tuple(words.size), frames=16 * words.seconds + 1)
        began = time.monotonic()
        evaluate(
            str(bundle), out=str(Path(folder, "run")), seconds=(words.seconds,), scenes=words.scenes,
            lpips=words.lpips, device="cpu",
        )  # fmt: skip
        minutes = (time.monotonic() - began) / 60
        print(f"{words.size[0]}x{words.size[1]}, {words.seconds} s: {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
