"""The LightningCLI behind `relic fit|validate|test|predict`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from relic.callbacks import VideoWriter
from relic.data import WorldDataModule
from relic.modules.base import RelicModule

__all__ = ["RelicCLI"]


def checkpoints_in(root: str | None) -> str:
    """Return the folder of checkpoints, beside the run's other files: `--ckpt_path last` looks there."""
    return str(Path(root or "runs/default") / "checkpoints")


class Checkpoint(ModelCheckpoint):
    """Keeps what a run goes on from; never between accumulated gradients, which no checkpoint holds."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.fit_loop._should_accumulate() or not trainer.global_step:
            return
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop._should_accumulate():
            super().on_validation_end(trainer, pl_module)


class Begun(Callback):
    """Knows whether a run has come as far as its first batch."""

    def __init__(self) -> None:
        self.value = False

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.value = True

    on_sanity_check_start = on_train_start = begin
    on_validation_start = on_test_start = on_predict_start = begin


class RelicCLI(LightningCLI):
    """One datamodule, one class per stage; shapes are said once, in `data.clip`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.clip", "model.init_args.clip")
        parser.link_arguments("model.init_args.vae", "data.vae")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.every_n_train_steps": 100})
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoints_in)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError) as error:
            while cause := error.__cause__ or error.__context__:
                error = cause  # type: ignore[assignment] # the parser wraps what our classes say in what it tried
            self.parser.error(str(error))

    # what does not fit is told in a line as long as no time was spent; what fails later has its traceback

    def fit(self, **words: Any) -> None:
        self._begin(self.trainer.fit, words)

    def validate(self, **words: Any) -> None:
        self._begin(self.trainer.validate, words)

    def test(self, **words: Any) -> None:
        self._begin(self.trainer.test, words)

    def predict(self, **words: Any) -> None:
        writer = VideoWriter(fps=self.datamodule.clip.fps)
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self._begin(self.trainer.predict, {**words, "return_predictions": False})
        print(f"Wrote {writer.count} videos to {writer.folder}")

    def _begin(self, run: Callable[..., Any], words: dict[str, Any]) -> None:
        begun = Begun()
        self.trainer.callbacks.append(begun)  # type: ignore[attr-defined]
        try:
            run(**words)
        except (ValueError, OSError) as error:
            if begun.value:
                raise
            sys.exit(f"relic {run.__name__}: {error}")

    @classmethod
    def run(cls, args: Any, *, execute: bool = True) -> RelicCLI:
        """Parse `args` (words, or a dict) and, unless told otherwise, execute the subcommand in them."""
        return cls(
            RelicModule,
            WorldDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "default_root_dir": "runs/default"},
            args=args,
            run=execute,
        )
