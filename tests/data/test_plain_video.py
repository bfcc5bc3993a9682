"""Plain video mixed into training: exactly its share, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from relic.data import PlainVideo, WorldDataModule
from relic.types import ClipSpec, Mixed
from tests.data.recordings import latents_sample, write_dataset

CLIP = ClipSpec(height=64, width=64, horizons=(33,))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five encoded windows of other scenes, their captions naming them."""
    samples = [(f"plain{i}", latents_sample(33, seed=50 + i, scene=f"field{i}")) for i in range(5)]
    return write_dataset(tmp_path_factory.mktemp("plain"), samples)


def data_module(root: Path, plain: Path, *, share: float = 0.25, **settings: Any) -> WorldDataModule:
    return WorldDataModule(
        root=str(root), clip=CLIP, content="latents", workers=0, validation_windows=2,
        plain=PlainVideo(root=str(plain), share=share, validation_scenes=1, evaluation_scenes=1),
        **{"global_batch": 8, "batches_per_epoch": 3, **settings},
    )  # fmt: skip


def training(data: WorldDataModule, *, rank: int = 0, world_size: int = 1) -> list[Mixed]:
    connector = SimpleNamespace(use_distributed_sampler=False)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1,
        _accelerator_connector=connector, fit_loop=loop,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
    )  # fmt: skip
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.125, 1)])
def test_every_batch_holds_exactly_its_share(encoded: Path, plain: Path, share: float, count: int) -> None:
    for mixed in training(data_module(encoded, plain, share=share)):
        assert len(mixed.plain.key) == count and len(mixed.steered.key) == 8 - count


def test_each_part_is_read_from_its_own_dataset(encoded: Path, plain: Path) -> None:
    known = {}
    for name, root in (("steered", encoded), ("plain", plain)):
        data = WorldDataModule(root=str(root), clip=CLIP, content="latents", workers=0, global_batch=8,
                               batches_per_epoch=8, validation_scenes=0, evaluation_scenes=0)  # fmt: skip
        data.setup("fit")
        known[name] = torch.cat([batch.latents for batch in data.train_dataloader()]).unique(dim=0)
    for mixed in training(data_module(encoded, plain)):
        for name in ("steered", "plain"):
            for latents in getattr(mixed, name).latents:
                other = known["plain" if name == "steered" else "steered"]
                assert any(torch.equal(latents, one) for one in known[name])
                assert not any(torch.equal(latents, one) for one in other)


def test_no_two_samples_share_their_noise(encoded: Path, plain: Path) -> None:
    keys = [
        key for mixed in training(data_module(encoded, plain)) for part in mixed for key in part.key.tolist()
    ]
    assert len(set(keys)) == len(keys) == 24


def test_two_ranks_read_what_one_reads(encoded: Path, plain: Path) -> None:
    whole = training(data_module(encoded, plain))
    ranks = [training(data_module(encoded, plain), rank=rank, world_size=2) for rank in (0, 1)]
    for one, first, second in zip(whole, *ranks, strict=True):
        for all_of_it, a, b in zip(one, first, second, strict=True):
            assert torch.equal(all_of_it.key[0::2], a.key) and torch.equal(all_of_it.key[1::2], b.key)
            assert torch.equal(all_of_it.latents[0::2], a.latents)


def test_validation_is_that_of_the_dataset_with_actions(encoded: Path, plain: Path) -> None:
    mixed = data_module(encoded, plain)
    alone = WorldDataModule(root=str(encoded), clip=CLIP, content="latents", workers=0, validation_windows=2)
    keys = []
    for data in (mixed, alone):
        data.setup("fit")
        keys.append([batch.key.tolist() for batch in data.val_dataloader()])
    assert keys[0] == keys[1]


class Recorder(LightningModule):
    """Writes down the keys it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Mixed, batch_idx: int) -> torch.Tensor:
        self.seen.append([*batch.steered.key.tolist(), *batch.plain.key.tolist()])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_resuming_goes_on_exactly(encoded: Path, plain: Path, tmp_path: Path) -> None:
    def fit(steps: int, resume: Path | None = None) -> tuple[Trainer, Recorder]:
        run = Trainer(
            accelerator="cpu", max_steps=steps, logger=False, use_distributed_sampler=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            limit_val_batches=0, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Recorder()
        run.fit(module, data_module(encoded, plain), ckpt_path=resume)
        return run, module

    _, straight = fit(8)
    first, stopped = fit(4)  # in the second epoch of three batches
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = fit(8, resume=tmp_path / "half.ckpt")
    assert stopped.seen + rest.seen == straight.seen and len(straight.seen) == 8


def test_both_parts_go_on_from_a_saved_batch_index(encoded: Path, plain: Path) -> None:
    whole, rest = (data_module(encoded, plain, batches_per_epoch=count) for count in (4, 2))
    rest.load_state_dict({"batch_index": 2})
    keys = []
    for data in (whole, rest):
        data.setup("fit")
        keys.append([[part.key.tolist() for part in mixed] for mixed in data.train_dataloader()])
    assert keys[1] == keys[0][2:]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_that_is_no_whole_number_of_samples_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"plain\.share={share:g} of global_batch=8 must be a whole number"):
        data_module(Path("x"), Path("y"), share=share)


def test_parts_that_ranks_cannot_share_are_refused(encoded: Path, plain: Path) -> None:
    with pytest.raises(ValueError, match=r"batch of 7 cannot be shared by 2 ranks.*parts of a mixture"):
        training(data_module(encoded, plain, share=0.125), rank=0, world_size=2)
