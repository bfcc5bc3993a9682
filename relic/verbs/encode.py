"""`relic encode`: recordings -> latent shards."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from relic.data.encode import EncodeSettings, encode_dataset
from relic.nn.checkpoints import file_sha256
from relic.nn.tiny_vae import TinyVAE
from relic.ops.video import from_uint8

__all__ = ["encode"]


def encode(
    src: str,
    *,
    out: str,
    vae: str,
    horizon: tuple[int, ...] = (81,),
    stride_seconds: float = 1.0,
    palindromes: float = 0.5,
    seed: int = 0,
    batch: int = 8,
    workers: int | None = None,
    max_corrupt: float = 0.01,
    part: tuple[int, int] = (0, 1),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Encode a dataset of recordings into latent shards. Stopped, it goes on when started again.

    Args:
        src: Folder or fsspec URL of the recordings, with their index.
        out: Folder of the latent shards.
        vae: Weights of the autoencoder (safetensors).
        horizon: Frames of the windows, 4k+1; several are allowed.
        stride_seconds: A window starts every so many seconds of a recording.
        palindromes: Share of windows that turn back in time.
        seed: Of which windows turn, and where.
        batch: Windows encoded at a time.
        workers: Threads that decode video; by default one a core.
        max_corrupt: Share of the windows, of the part, that may be unreadable and left out.
        part: Number, from 0, and count of processes that share the work, each given its own number.
        device: Where to encode; auto takes a GPU if there is one, and bf16 there.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    if device != "auto":
        place = torch.device(device)
    net = TinyVAE.from_file(vae).to(place)

    @torch.inference_mode()
    def encode_video(video: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            return net.encode(from_uint8(video.to(place)))

    settings = EncodeSettings(
        horizons=tuple(horizon),
        stride_seconds=stride_seconds,
        palindromes=palindromes,
        seed=seed,
        vae_sha256=file_sha256(vae),
    )
    with tqdm(unit=" windows", desc="encode") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = encode_dataset(
            src,
            out,
            encode=encode_video,
            settings=settings,
            batch=batch,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            max_corrupt=max_corrupt,
            part=part,
            progress=show,
        )
    print(f"Wrote {index}" if index else f"Wrote part {part[0]} of {part[1]} to {out}; others are to come.")
