"""The bundle: a folder that holds all that playing a world takes, and nothing of how it was trained.

world.yaml            format, d_bar, sizes, policy, sampler, versions, hashes of the files beside it
student.safetensors   the student, its word table inside
vae.safetensors       the autoencoder
start.png             a picture to start from, if it has one; its prompt is in world.yaml

session = relic.World.load("bundle").start(image, "a red room", seed=0)
session = relic.World.load("tiny").start()  # the world that is shipped
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from relic import __version__
from relic.nn.checkpoints import (
    WeightsSource,
    file_sha256,
    load_weights,
    read_header,
    save_weights,
    write_weights,
)
from relic.nn.denoiser import Denoiser
from relic.nn.eight_bits import FromEightBits, InEightBits
from relic.nn.memory import Memory
from relic.nn.memory_plan import MemoryPlan
from relic.nn.student import StudentConfig
from relic.nn.tensor_files import Tensors
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.nn.wan_layout import open_tensors
from relic.ops.words import word_ids
from relic.rollout import KeyedNoise, Rollout
from relic.session import Session, Snapshot
from relic.types import latents_of

__all__ = ["Scene", "World", "find_bundle", "write_bundle"]

FORMAT = "relic-world/1"
CARD, STUDENT, VAE, START = "world.yaml", "student.safetensors", "vae.safetensors", "start.png"
SHIPPED = Path(__file__).with_name("worlds")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """Where a world can be entered.

    Args:
        image: A picture of the world's size, (h, w, 3) uint8.
        prompt: What is there.
    """

    image: Tensor = field(repr=False)
    prompt: str


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """A world that can be played. `load` and `start` are all that most code needs.

    Args:
        net: The student.
        vae: The autoencoder, on the same device.
        config: What the student is beside its weights; its policy and sampler are those played with.
        d_bar: Scene units a frame that 1.0 of a translation channel stands for: the median of the training
            set. Networks never see it; engines that lay truth beside the world do.
        name: Hash of the student's file, which snapshots carry.
        scene: Where it is entered unless `start` is given another picture.
    """

    net: Denoiser = field(repr=False)
    vae: TinyVAE = field(repr=False)
    config: StudentConfig
    d_bar: float
    name: str = ""
    scene: Scene | None = None

    def __post_init__(self) -> None:
        _check(self.config, self.vae.config, d_bar=self.d_bar, scene=self.scene)

    # -- files -----------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> World:
        """Read a bundle.

        path: its folder, or the name of a world that is shipped: "tiny". device: where networks and memories
        are. dtype: of the student and its memory; bfloat16 on a GPU.

        Raises:
            FileNotFoundError: If the folder or a file of it is missing.
            ValueError: If it is of another format, or its files are not those that it was written with.
        """
        root = find_bundle(path)
        card = read_card(root)
        for name, expected in card["files"].items():
            found = file_sha256(root / name)
            if found != expected:
                raise ValueError(
                    f"{root / name} has sha256 {found[:12]}..., {CARD} says {expected[:12]}...: the file was "
                    "changed or damaged. Copy the bundle again, or export it again."
                )
        config = _config_of(root, card)
        with torch.device("meta"):
            net = config.build()
        net.to(dtype)
        load_weights(net, WeightsSource(path=str(root / STUDENT)), kind="student", device=device)
        vae = TinyVAE.from_file(root / VAE).to(device).requires_grad_(False)
        return cls(
            net=net.eval().requires_grad_(False),
            vae=vae,
            config=config,
            d_bar=float(card["d_bar"]),
            name=card["files"][STUDENT],
            scene=_read_scene(root, card),
        )

    def save(self, path: str | Path) -> None:
        """Write this world as a bundle, a new folder, whole or not at all.

        Raises:
            FileExistsError: If `path` exists.
        """

        def weights(folder: Path) -> None:
            values = self.net.state_dict()
            save_weights(folder / STUDENT, values, kind="student", config=self.config.to_header())
            self.vae.save(folder / VAE)

        _write(
            Path(path), weights, config=self.config, vae=self.vae.config, d_bar=self.d_bar, scene=self.scene
        )

    # -- playing ---------------------------------------------------------------------------------------------

    @property
    def endless(self) -> bool:
        """Whether streams have no end: the policy bounds the memory and maps places in time back."""
        return self.config.policy.repositions

    def plan(self) -> MemoryPlan:
        """Return the sizes of a session's memory."""
        return self.config.plan(endless=self.endless)

    def start(
        self,
        image: Tensor | None = None,
        prompt: str | None = None,
        *,
        seed: int = 0,
        undo_seconds: float = 10.0,
    ) -> Session:
        """Return a session that stands at an image (h, w, 3) uint8 of the world's size.

        image, prompt: by default those of the bundle's own scene; an image without a prompt has "".
        undo_seconds: see `Session`; each block of these costs a copy of the memory.

        Raises:
            ValueError: If the image is of another size or type, or there is none.
        """
        if image is None:
            if self.scene is None:
                raise ValueError("This world has no picture of its own to start from: give an image.")
            image, prompt = self.scene.image, self.scene.prompt if prompt is None else prompt
        clip = self.config.clip
        if image.shape != (clip.height, clip.width, 3):
            raise ValueError(
                f"image is {tuple(image.shape)}; this world takes ({clip.height}, {clip.width}, 3): resize "
                "it."
            )
        return Session(
            self.rollout,
            self.vae,
            image=image,
            prompt=prompt or "",
            read=self.read,
            fps=clip.fps,
            seed=seed,
            undo_seconds=undo_seconds,
            world=self.name,
        )

    def resume(self, snapshot: Snapshot, *, undo_seconds: float = 10.0) -> Session:
        """Return a session that stands where a snapshot was taken; see `Session.restore`."""
        clip = self.config.clip
        blank = torch.zeros(clip.height, clip.width, 3, dtype=torch.uint8)
        session = self.start(blank, "", undo_seconds=undo_seconds)
        session.restore(snapshot)
        return session

    def rollout(self, seed: int) -> Rollout:
        """Return a rollout of one stream with an empty memory."""
        weight = next(self.net.parameters())
        memory = Memory(self.plan(), dtype=weight.dtype, device=weight.device)
        noise = KeyedNoise((seed,), purpose=("session",))
        return Rollout(self.net, memory, noise=noise, sampler=self.config.sampler)

    def read(self, prompt: str) -> Tensor:
        """Return the word ids (1, n) of a prompt."""
        ids = word_ids(prompt, length=self.config.net.text_length)
        return ids[None].to(next(self.net.parameters()).device)


def find_bundle(path: str | Path) -> Path:
    """Return the folder of a bundle: `path`, unless nothing is there and a shipped world has that name."""
    shipped = SHIPPED / path
    return shipped if not Path(path).is_dir() and (shipped / CARD).is_file() else Path(path)


def write_bundle(
    path: str | Path,
    *,
    student: str | Path,
    vae: str | Path,
    d_bar: float,
    config: StudentConfig,
    scene: Scene | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a bundle from weights on disk.

    config: the student's, with the policy and sampler to play with. dtype: that weights are rounded to; None
    copies the files as they are. int8 is for the student's matrices; the autoencoder is then bfloat16.

    Raises:
        FileExistsError: If `path` exists.
        FileNotFoundError, ValueError: If weights are missing, or don't belong together.
    """

    def weights(folder: Path) -> None:
        for source, name in ((student, STUDENT), (vae, VAE)):
            if dtype is None:
                shutil.copyfile(source, folder / name)
            else:
                header = read_header(source)
                tensors: Tensors = FromEightBits(open_tensors(Path(source), member=None))
                if dtype == torch.int8 and name == STUDENT:
                    write_weights(folder / name, InEightBits(tensors), **header)
                else:
                    floats = torch.bfloat16 if dtype == torch.int8 else dtype
                    write_weights(folder / name, tensors, **header, dtype=floats)

    own = StudentConfig.from_header(read_header(student, kind="student")["config"])
    _check_same(Path(student), own, config)
    vae_config = TinyVAEConfig.from_dict(read_header(vae, kind="tiny_vae")["config"])
    _write(Path(path), weights, config=config, vae=vae_config, d_bar=d_bar, scene=scene)


def read_card(root: Path) -> dict[str, Any]:
    """Return what `world.yaml` says.

    Raises:
        FileNotFoundError: If the bundle or a file of it is missing.
        ValueError: If it is of another format, or says less than it must.
    """
    path = root / CARD
    if not path.is_file():
        there = "the folder does not exist" if not root.is_dir() else f"it holds no {CARD}"
        shipped = sorted(folder.name for folder in SHIPPED.glob("*/"))
        hidden = root.is_dir() and root.name in shipped
        remedy = "Rename it to have the shipped one" if hidden else "Write one: relic export"
        raise FileNotFoundError(
            f"No world at {root}: {there}. {remedy}. Shipped: {', '.join(shipped) or 'none'}."
        )
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} says format {found!r}, this version ({__version__}) reads {FORMAT!r}: export the "
            "student again with this version, or use the version that wrote it."
        )
    needed = {"d_bar", "files", "dit", "words", "clip", "policy", "sampler"}
    files = set(card.get("files") or ())
    lacking = sorted(needed - card.keys()) + [f"files: {name}" for name in sorted({STUDENT, VAE} - files)]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; export the world again.")
    missing = sorted(name for name in files if not (root / name).is_file())
    if missing:
        raise FileNotFoundError(
            f"{root} lacks {', '.join(missing)}: copy the bundle again, or export it again."
        )
    return card


def _read_scene(root: Path, card: Mapping[str, Any]) -> Scene | None:
    if START not in card["files"]:
        return None
    image = torch.from_numpy(np.array(Image.open(root / START).convert("RGB")))
    return Scene(image=image, prompt=str(card.get("prompt", "")))


def _config_of(root: Path, card: Mapping[str, Any]) -> StudentConfig:
    """Return the student's config as the card says it, which must be the weights' in all but how it plays."""
    try:
        config = StudentConfig.from_header(card)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{root / CARD} can't be read ({error}); export the world again.") from error
    header = read_header(root / STUDENT, kind="student")["config"]
    _check_same(root / STUDENT, StudentConfig.from_header(header), config)
    return config


def _check_same(path: Path, weights: StudentConfig, config: StudentConfig) -> None:
    """Refuse another network or clip than the weights'; policy and sampler are a choice."""
    for name in ("net", "words", "clip"):
        own, asked = getattr(weights, name), getattr(config, name)
        if own != asked:
            raise ValueError(
                f"{path} has {name} {own}, but the world says {asked}: they belong to the weights. "
                "Export the world again."
            )


def _check(config: StudentConfig, vae: TinyVAEConfig, *, d_bar: float, scene: Scene | None) -> None:
    if config.net.latent_channels != vae.latent_channels:
        raise ValueError(
            f"The student has {config.net.latent_channels} latent channels and the autoencoder "
            f"{vae.latent_channels}: give the autoencoder that its training set was encoded with."
        )
    if config.words is None:
        raise ValueError(
            "The student reads prompt embeddings; a bundle holds no text encoder. Only students with a word "
            "table (words) can be exported."
        )
    if not (math.isfinite(d_bar) and d_bar > 0):
        raise ValueError(f"d_bar={d_bar} must be positive: the mean moving step, scene units a frame.")
    size = (config.clip.height, config.clip.width, 3)
    if scene is not None and (scene.image.shape != size or scene.image.dtype != torch.uint8):
        raise ValueError(
            f"the scene's image is {tuple(scene.image.shape)}, {scene.image.dtype}; a picture of the world's "
            f"size, {size} uint8, is needed."
        )
    span, room, trained = config.policy.span, config.policy.room, latents_of(config.clip.max_frames)
    if config.policy.repositions and span is not None and room is not None and span + room > trained:
        raise ValueError(
            f"max_latents={span + room} goes beyond the {trained} latents of the student's horizon, the "
            f"places in time that it knows; use at most {trained}."
        )
    config.plan(endless=config.policy.repositions)  # refuses a policy that does not fit


def _write(
    path: Path,
    weights: Callable[[Path], None],
    *,
    config: StudentConfig,
    vae: TinyVAEConfig,
    d_bar: float,
    scene: Scene | None,
) -> None:
    """Write a bundle whose weights `weights` puts into a folder."""
    _check(config, vae, d_bar=d_bar, scene=scene)
    if path.exists():
        raise FileExistsError(f"{path} exists; give another folder, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        weights(folder)
        if scene is not None:
            Image.fromarray(scene.image.cpu().numpy()).save(folder / START)
        card = {
            "format": FORMAT,
            "d_bar": d_bar,
            **_plain(config.to_header()),
            "vae": _plain(asdict(vae)),
            "versions": {"relic": __version__, "torch": str(torch.__version__)},
            **({} if scene is None else {"prompt": scene.prompt}),
            "files": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
        }
        text = yaml.safe_dump(card, sort_keys=False, width=110)
        (folder / CARD).write_text(text, encoding="utf-8")
        folder.rename(path)


def _plain(value: Any) -> Any:
    """Return a value with lists for tuples, as YAML and JSON know them."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
