"""The data module: batches of windows from a dataset, the same on any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from relic.data.collate import keys_from
from relic.data.index import Index, Row
from relic.data.loader import BatchLoader, MixedLoader, Place, WindowDataset
from relic.data.reader import WindowReader
from relic.data.sampling import FixedPlan, Plan, Split, TrainPlan, Windows, rank_places
from relic.data.select import check_shape, check_vae, lay_out, levels_of, rows_of, split_rows
from relic.data.storage import Storage
from relic.ops.randomness import derive_seed
from relic.types import ClipSpec

__all__ = ["PlainVideo", "WorldDataModule"]


@dataclass(frozen=True, kw_only=True)
class PlainVideo:
    """Video mixed into training batches without its actions, so that a pretrained network keeps what it knew.

    Args:
        root: Folder or fsspec URL of its dataset.
        share: Share of every global batch; it must give a whole number of samples.
        validation_scenes: Its scenes kept from training for validation.
        evaluation_scenes: Its scenes kept from training and validation for the final test.
    """

    root: str
    share: float
    validation_scenes: int = 2
    evaluation_scenes: int = 2

    def samples(self, global_batch: int) -> int:
        """Return how many samples of a global batch are plain.

        Raises:
            ValueError: If the share gives none, all, or no whole number of them.
        """
        count = round(self.share * global_batch)
        if not 0 < count < global_batch or abs(count - self.share * global_batch) > 1e-6:
            near = min(max(count, 1), global_batch - 1) / global_batch
            raise ValueError(
                f"plain.share={self.share:g} of global_batch={global_batch} must be a whole number "
                f"of samples, neither none nor all; use e.g. {near:g}, or another global_batch (2 or more)."
            )
        return count


class WorldDataModule(LightningDataModule):
    """Yields `relic.types.Batch` from a dataset of shards with an index; for training on a mixture, `Mixed`.

    Every draw is a pure function of (seed, batch index, place in the global batch); the batch index counts
    consumed training batches, runs on across epochs and is saved with checkpoints. So two ranks read what
    one would, and a resumed run goes on where it stopped, with any number of workers.

    Args:
        root: Folder or fsspec URL of the dataset, which holds `index.parquet` and `shards/`.
        clip: Size, rate and lengths of what is read. With several horizons, each batch draws one.
        content: What a batch holds: encoded windows, states of ODE solutions, or frames.
        global_batch: Samples a batch over all ranks.
        batches_per_epoch: Batches in what the trainer calls an epoch.
        workers: Reading processes on each rank.
        seed: Of sample order, windows, augmentation and noise keys.
        palindromes: Share of training windows that turn back in time; for video only, latents carry it in
            the shards.
        balance: How much rare actions are favoured: 0 not at all, 1 until dominant actions are equally
            likely.
        validation_scenes: Scenes kept from training for validation.
        evaluation_scenes: Scenes kept from training and validation for the final test.
        validation_windows: Fixed windows in a validation or test run, over all ranks.
        max_corrupt: Share of unreadable samples above which the run fails.
        vae: File of VAE weights that latents must come from; None does not check.
        words: Length of the text in word ids.
        plain: Video that takes a share of each training batch, without its actions; None mixes none.

    Raises:
        ValueError: In the constructor for settings out of range; in `setup` if the dataset does not fit them.
        FileNotFoundError: In `setup`, if the dataset, its index or some of its shards are missing.
    """

    def __init__(
        self,
        *,
        root: str,
        clip: ClipSpec,
        content: Literal["latents", "trajectory", "video"] = "video",
        global_batch: int = 8,
        batches_per_epoch: int = 1000,
        workers: int = 4,
        seed: int = 0,
        palindromes: float = 0.0,
        balance: float = 0.5,
        validation_scenes: int = 2,
        evaluation_scenes: int = 2,
        validation_windows: int = 16,
        max_corrupt: float = 0.01,
        vae: str | None = None,
        words: int = 32,
        plain: PlainVideo | None = None,
    ) -> None:
        super().__init__()
        for name, share in (("palindromes", palindromes), ("balance", balance), ("max_corrupt", max_corrupt)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be in [0, 1].")
        for name, count, least in (
            ("global_batch", global_batch, 1),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("workers", workers, 0),
            ("validation_scenes", validation_scenes, 0),
            ("evaluation_scenes", evaluation_scenes, 0),
            ("validation_windows", validation_windows, 1),
            ("words", words, 1),
        ):
            if count < least:
                raise ValueError(f"{name}={count} must be at least {least}.")
        if content not in ("latents", "trajectory", "video"):
            raise ValueError(f"content={content!r} must be 'latents', 'trajectory' or 'video'.")
        if palindromes and content != "video":
            raise ValueError(
                f"palindromes={palindromes} with content={content!r}: encoded windows cannot be turned "
                "back in time; set palindromes=0 here and turn them when encoding."
            )
        self.root = root
        self.clip = clip
        self.content = content
        self.global_batch = global_batch
        self.batches_per_epoch = batches_per_epoch
        self.workers = workers
        self.seed = seed
        self.palindromes = palindromes
        self.balance = balance
        self.validation_scenes = validation_scenes
        self.evaluation_scenes = evaluation_scenes
        self.validation_windows = validation_windows
        self.max_corrupt = max_corrupt
        self.vae = vae
        self.words = words
        self._reader = WindowReader(
            Storage(root), size=(clip.height, clip.width), content=content, words=words
        )
        self._rows: dict[Split, tuple[Row, ...]] = {}
        self._levels: tuple[float, ...] | None = None
        self._training: BatchLoader | MixedLoader | None = None  # whose processes are to be ended
        self._plain = self._plain_module(plain) if plain is not None else None
        self._steered = global_batch - (plain.samples(global_batch) if plain is not None else 0)
        self._resumed = 0  # the batch index loaded from a checkpoint
        self._processed_before = 0  # batches the trainer counted before that one

    def _plain_module(self, plain: PlainVideo) -> WorldDataModule:
        return WorldDataModule(
            root=plain.root,
            clip=self.clip,
            content=self.content,
            global_batch=plain.samples(self.global_batch),
            batches_per_epoch=self.batches_per_epoch,
            workers=self.workers,
            seed=derive_seed(self.seed, "plain"),  # else its samples would share keys with the others
            palindromes=self.palindromes,
            balance=0.0,  # by actions, which are not used here
            validation_scenes=plain.validation_scenes,
            evaluation_scenes=plain.evaluation_scenes,
            validation_windows=self.validation_windows,
            max_corrupt=self.max_corrupt,
            vae=self.vae,
            words=self.words,
        )

    def setup(self, stage: str | None = None) -> None:
        """Read the index and check all that can be checked before time is spent."""
        self._check_trainer()
        if self._plain is not None and stage in ("fit", None):
            self._plain.trainer = self.trainer
            self._plain.setup(stage)
        index = Index.open(self.root)
        self._say_what_is_left_out(index)
        rows = rows_of(index, content=self.content)
        check_shape(rows, clip=self.clip, content=self.content)
        if self.vae is not None and self.content != "video":
            check_vae(rows, vae=self.vae)
        self._levels = levels_of(rows) if self.content == "trajectory" else None
        self._rows = {}
        for split in _splits(stage, with_validation=self.validation_scenes > 0):
            self._rows[split] = split_rows(
                rows,
                scenes=index.scenes,
                split=split,
                validation_scenes=self.validation_scenes,
                evaluation_scenes=self.evaluation_scenes,
            )
            for num_frames in self.clip.horizons:
                lay_out(self._rows[split], num_frames=num_frames, fps=self.clip.fps, balance=self.balance)

    def _say_what_is_left_out(self, index: Index) -> None:
        for shard, reason in index.damaged.items():
            rank_zero_warn(f"{self.root}: {shard} was damaged when the index was written: {reason}")
        if invalid := index.invalid():
            named = "; ".join(f"{row.key} in {row.shard}: {row.reason}" for row in invalid[:5])
            rank_zero_warn(
                f"{self.root}: {len(invalid)} of {len(index.rows)} samples are invalid and left out: {named}"
                f"{'; ...' if len(invalid) > 5 else ''}"
            )

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Move a batch, but for its keys."""
        return keys_from(batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    def train_dataloader(self) -> BatchLoader | MixedLoader:
        windows = [self._windows("train", num_frames) for num_frames in self.clip.horizons]
        plan = TrainPlan(windows=windows, seed=self.seed, palindromes=self.palindromes)
        self._processed_before = self._processed() - self._resumed if self._resumed else 0
        loader = self._loader(plan, self._training_places, length=self.batches_per_epoch, keep_workers=True)
        self._training = loader
        if self._plain is not None:
            plain = self._plain.train_dataloader()
            assert isinstance(plain, BatchLoader)  # it has no plain part of its own
            self._training = MixedLoader(loader, plain)
        return self._training

    def teardown(self, stage: str | None = None) -> None:
        """End the processes that read for training."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def val_dataloader(self) -> BatchLoader | list[Any]:
        return self._fixed_loader("validation") if self.validation_scenes else []

    def test_dataloader(self) -> BatchLoader:
        return self._fixed_loader("evaluation")

    def predict_dataloader(self) -> BatchLoader:
        return self._fixed_loader("evaluation")

    @property
    def levels(self) -> tuple[float, ...] | None:
        """Noise levels of the states of trajectories but the clean last; known after `setup`, None for other
        content.
        """
        return self._levels

    @property
    def batch_index(self) -> int:
        """The number of training batches consumed so far, over all epochs and resumed runs."""
        return self._processed() - self._processed_before if self.trainer else self._resumed

    def state_dict(self) -> dict[str, Any]:
        return {"batch_index": self.batch_index}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["batch_index"]
        if self._plain is not None:
            self._plain.load_state_dict(state_dict)

    def _processed(self) -> int:
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed  # not `completed`: checkpoints are written between the two

    def _training_places(self) -> Iterator[list[Place]]:
        """Yield an epoch's places from the current batch on; resumed inside it, the trainer stops early."""
        first = self.batch_index
        if self.trainer is None:
            self._resumed += self.batches_per_epoch  # alone, each pass over the loader is an epoch
        for batch_index in range(first, first + self.batches_per_epoch):
            yield [Place(batch_index, place) for place in self._share(self._steered)]

    def _fixed_loader(self, split: Split) -> BatchLoader:
        windows = self._windows(split, self.clip.max_frames)
        plan = FixedPlan.of(windows, seed=self.seed, stage=split, batch=self.global_batch)
        starts = range(0, self.validation_windows, self.global_batch)
        sizes = [min(self.global_batch, self.validation_windows - start) for start in starts]

        def places() -> Iterator[list[Place]]:
            for batch_index, size in enumerate(sizes):
                yield [Place(batch_index, place) for place in self._share(size)]

        return self._loader(plan, places, length=len(sizes), keep_workers=False)

    def _windows(self, split: Split, num_frames: int) -> Windows:
        return lay_out(self._rows[split], num_frames=num_frames, fps=self.clip.fps, balance=self.balance)

    def _loader(
        self, plan: Plan, places: Callable[[], Iterator[list[Place]]], *, length: int, keep_workers: bool
    ) -> BatchLoader:
        return BatchLoader(
            WindowDataset(self._reader, plan),
            places,
            length=length,
            workers=self.workers,
            max_corrupt=self.max_corrupt,
            keep_workers=keep_workers,
            warn=rank_zero_warn,
        )

    def _share(self, size: int) -> range:
        """Return the places of a global batch of `size` that this rank reads."""
        ranks = self.trainer.distributed_sampler_kwargs if self.trainer else None
        ranks = ranks or {"rank": 0, "num_replicas": 1}
        return rank_places(size, rank=ranks["rank"], world_size=ranks["num_replicas"])

    def _check_trainer(self) -> None:
        if self.trainer is None:
            return
        if self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "this data module shares batches among ranks itself, so that two ranks read what one would; "
                "construct the trainer with Trainer(use_distributed_sampler=False)."
            )
        self._share(self._steered)
        self._share(self.validation_windows)
        accumulated = self.trainer.accumulate_grad_batches
        if self.batches_per_epoch % accumulated:
            near = max(1, round(self.batches_per_epoch / accumulated)) * accumulated
            raise ValueError(
                f"batches_per_epoch={self.batches_per_epoch} must be a multiple of accumulate_grad_batches="
                f"{accumulated}, or the last step of an epoch is made of fewer batches; use {near}."
            )


def _splits(stage: str | None, *, with_validation: bool) -> tuple[Split, ...]:
    """Return the splits that a stage of the trainer reads."""
    validation: tuple[Split, ...] = ("validation",) if with_validation else ()
    if stage == "fit":
        return ("train", *validation)
    if stage == "validate":
        return validation
    if stage in ("test", "predict"):
        return ("evaluation",)
    return ("train", *validation)
