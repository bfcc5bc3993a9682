"""How long does a public checkpoint take to load, and how much host memory? Random shards are written once,
and loaded into a network on the meta device in a fresh process.

Usage: python benchmarks/load.py FOLDER --size 14b --shards 6 --device cuda
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor

from relic.nn.checkpoints import WeightsSource, load_weights
from relic.nn.control import ControlConfig
from relic.nn.dit import DiT, DiTConfig
from relic.nn.tensor_files import Stored
from relic.nn.tensor_writer import write_shards
from relic.nn.wan_layout import config_json

SIZES = {"1b": DiTConfig.wan_1b, "14b": DiTConfig.wan_14b}
PATTERN = 2**20  # values of noise, repeated: drawing billions would take longer than writing them


def config_of(args: argparse.Namespace, *, control: bool) -> DiTConfig:
    """Return the sizes asked for."""
    changes = {} if args.depth is None else {"depth": args.depth}
    return SIZES[args.size](**changes, control=ControlConfig() if control else None)


def noise_like(entry: Stored) -> Tensor:
    """Return the tensor that the shards hold for an entry."""
    noise = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(entry.dtype)
    return noise.repeat(-(-entry.numel // PATTERN))[: entry.numel].reshape(entry.shape)


def write(args: argparse.Namespace) -> None:
    """Write a folder of the original layout, tensor by tensor."""
    config, dtype = config_of(args, control=False), getattr(torch, args.stored)
    with torch.device("meta"):
        entries = {k: Stored(tuple(v.shape), dtype) for k, v in DiT(config).state_dict().items()}
    total = sum(entry.nbytes for entry in entries.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, entry in entries.items():
            yield name, noise_like(entry)

    folder = Path(args.folder)
    folder.mkdir(parents=True)
    largest = max(entry.nbytes for entry in entries.values())  # a shard may end that much too early
    files = write_shards(folder, entries, tensors(), shard_bytes=total // args.shards + largest)
    (folder / "config.json").write_text(json.dumps(config_json(config, layout="original")))
    print(f"wrote {len(files)} shards, {total / 1e9:.2f} GB, peak host memory {host_peak() / 1e9:.2f} GB")


def host(field: str) -> int:
    """Return a line of this process's memory in bytes: VmRSS now, VmHWM at its peak; mapped files count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def host_peak() -> int:
    return host("VmHWM")


def load(args: argparse.Namespace) -> None:
    """Load the shards and print what it took."""
    device = torch.device(args.device)
    torch.zeros(1, device=device)  # the device's own context is not the loader's
    with torch.device("meta"):
        net = DiT(config_of(args, control=args.control)).to(getattr(torch, args.dtype))
    source = WeightsSource(path=args.folder, missing=("control",) if args.control else ())
    before = host("VmRSS")
    start = time.perf_counter()
    load_weights(net, source, kind="teacher", device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = host_peak() - before
    target = sum(p.numel() * p.element_size() for p in net.parameters())
    shard = max(path.stat().st_size for path in Path(args.folder).glob("*.safetensors"))
    above = peak - (target if device.type == "cpu" else 0)
    weight = net.blocks[-1].ffn[2].weight
    truth = noise_like(Stored(tuple(weight.shape), getattr(torch, args.stored)))
    assert torch.equal(weight.cpu(), truth.to(weight.dtype)), "what was loaded is not what was written"
    print(f"loaded {target / 1e9:.2f} GB in {seconds:.1f} s, {target / 1e9 / seconds:.2f} GB/s")
    print(f"host memory above the start {peak / 1e9:.2f} GB; above the target {above / 1e9:.2f} GB, ", end="")
    print(f"{above / shard:.2f} of a shard of {shard / 1e9:.2f} GB")
    if device.type == "cuda":
        print(f"device memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at its peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="14b")
    parser.add_argument("--depth", type=int, help="blocks, if not those of the size")
    parser.add_argument("--shards", type=int, default=6, help="at most")
    parser.add_argument("--stored", default="bfloat16", help="dtype of the shards")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--control", action="store_true", help="add control, which the shards lack")
    parser.add_argument("--child", choices=["write", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        {"write": write, "load": load}[args.child](args)
        return
    print(describe_machine())
    for child in ("write", "load"):
        if child == "load" or not Path(args.folder).exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", child], check=True)


if __name__ == "__main__":
    main()
