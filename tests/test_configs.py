"""Every config under configs/ parses, and what it describes can be built (1b and 14b on the meta device)."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, Trainer

from relic.callbacks import GapProbe, HeldOut
from relic.cli import find_config
from relic.modules import TeacherExtension
from relic.nn.dit import DiT, DiTConfig
from relic.nn.tensor_files import TensorsInMemory
from relic.nn.tuning import ControlFirst, FullTuning, LowRank
from relic.nn.wan_layout import write_public
from relic.ops.flow import steps_to
from relic.ops.retention import Compressed, Full, Window
from relic.stages import Checkpoint, RelicCLI
from tests.worlds import NANO, NANO_CLIP, NANO_WORDS, LatentWorld

ROOT = Path(__file__).parents[1] / "configs"
TEACHERS = [ROOT / "teacher" / f"{size}.yaml" for size in ("tiny", "1b", "14b")]
HORIZONS = [ROOT / "teacher" / "horizon" / f"{seconds}s.yaml" for seconds in (5, 10, 20)]
WHOLE = [ROOT / "teacher" / "demo.yaml", *sorted((ROOT / "autoencoder").glob("*.yaml"))]
CAUSAL_INITS = [ROOT / "causal_init" / f"{size}.yaml" for size in ("tiny", "1b", "14b")]
TRAINERS = sorted((ROOT / "trainer").glob("*.yaml"))
PLAIN = ROOT / "teacher" / "plain.yaml"  # goes after a size and a horizon
SELF_FORCING = [ROOT / "self_forcing" / f"{size}.yaml" for size in ("tiny", "1b", "14b")]
ROLLOUTS = [ROOT / "self_forcing" / "horizon" / f"{seconds}s.yaml" for seconds in (5, 10, 20)]
RECIPES = [
    *product(TEACHERS, HORIZONS),
    *product(TEACHERS, HORIZONS[:1], (PLAIN,)),
    *product(SELF_FORCING, ROLLOUTS),
    *((p,) for p in (*WHOLE, *CAUSAL_INITS)),
]
PIECES = [*sorted((ROOT / "net").glob("*.yaml"))]


@pytest.fixture(autouse=True)
def _bare_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["relic"])


def build(*configs: Path, extra: tuple[str, ...] = ()) -> RelicCLI:
    words = [word for path in configs for word in ("--config", str(path))]
    return RelicCLI.run([*words, "--data.root=nowhere", "--trainer.logger=false", *extra], execute=False)


def test_no_config_is_left_untested():
    tested = {path for recipe in RECIPES for path in recipe} | set(TRAINERS) | set(PIECES)
    assert tested == set(ROOT.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "+".join(str(p.relative_to(ROOT)) for p in r))
def test_a_recipe_parses_and_its_network_can_be_built(recipe):
    cli = build(*recipe, extra=("--trainer.accelerator=cpu",))
    with torch.device("meta"):
        cli.model.configure_model()
    assert sum(p.numel() for p in cli.model.net.parameters()) > 1e5
    assert cli.model.clip == cli.datamodule.clip


@pytest.mark.parametrize("path", TRAINERS, ids=lambda p: p.stem)
def test_a_trainer_config_only_says_things_the_trainer_knows(path):
    import inspect

    from lightning import Trainer

    settings = yaml.safe_load(path.read_text())
    assert set(settings) == {"trainer"}
    assert set(settings["trainer"]) <= set(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize("horizon", HORIZONS, ids=lambda p: p.stem)
def test_horizons_stretch_positions_by_latents_over_21(horizon):
    cli = build(TEACHERS[0], horizon, extra=("--trainer.accelerator=cpu",))
    latents = 1 + (cli.datamodule.clip.max_frames - 1) // 4
    assert cli.model.net_config.rope_factor == pytest.approx(latents / 21)
    assert (cli.model.init is None) == (latents == 21)


@pytest.mark.parametrize(
    ("horizon", "student_steps", "before"), zip(ROLLOUTS, (250, 150, 150), (None, *ROLLOUTS[:2]), strict=True)
)
def test_rollouts_lengthen_with_the_teacher_of_each_horizon_and_the_published_iterations(
    horizon, student_steps, before
):
    cli = build(SELF_FORCING[2], horizon, extra=("--trainer.accelerator=cpu",))
    teacher = build(TEACHERS[2], HORIZONS[ROLLOUTS.index(horizon)], extra=("--trainer.accelerator=cpu",))
    longest = build(TEACHERS[2], HORIZONS[2], extra=("--trainer.accelerator=cpu",))
    module = cli.model
    assert module.turns.student_steps(cli.trainer.max_steps) == student_steps
    assert module.turns.student_steps(cli.trainer.max_steps - 1) == student_steps - 1
    assert module.clip == teacher.model.clip
    assert module.teacher.path == f"{teacher.trainer.default_root_dir}/teacher.safetensors"
    assert module.teacher_rope_factor == teacher.model.net_config.rope_factor
    assert module.net_config == longest.model.net_config
    if before is not None:
        root = yaml.safe_load(before.read_text())["trainer"]["default_root_dir"]
        assert module.init.path == f"{root}/student.safetensors"
    with torch.device("meta"):
        module.configure_model()
    student, critic = module.configure_optimizers()
    rates = [(o.defaults["lr"], o.defaults["betas"], o.defaults["weight_decay"]) for o in (student, critic)]
    assert rates == [(2e-6, (0.0, 0.999), 0.01), (4e-7, (0.0, 0.999), 0.01)]
    assert (module.clip_norm, module.guidance, module.turns.ratio, module.ema_decay) == (10.0, 4.0, 5, 0.99)
    assert module.accumulate * cli.datamodule.global_batch == 64


@pytest.mark.parametrize(
    ("size", "first"), list(zip(SELF_FORCING, CAUSAL_INITS, strict=True)), ids=lambda p: p.stem
)
def test_self_forcing_goes_on_with_the_student_that_causal_init_wrote(size, first):
    before = build(first, extra=("--trainer.accelerator=cpu",))
    after = build(size, ROLLOUTS[0], extra=("--trainer.accelerator=cpu",))
    assert after.model.init.path == f"{before.trainer.default_root_dir}/student.safetensors"
    assert replace(after.model.student, clip=before.model.clip) == before.model.student


@pytest.mark.parametrize(
    ("student", "teacher"), list(zip(CAUSAL_INITS, TEACHERS, strict=True)), ids=lambda p: p.stem
)
def test_a_student_has_the_sizes_of_the_20_s_teacher_and_starts_where_that_wrote(student, teacher):
    first = build(teacher, HORIZONS[-1], extra=("--trainer.accelerator=cpu",))
    second = build(student, extra=("--trainer.accelerator=cpu",))
    assert second.model.net_config == first.model.net_config
    assert second.model.student.words == first.model.words
    written = Path(first.trainer.default_root_dir) / "teacher.safetensors"
    assert Path(second.model.init.path).parts[-3:] == written.parts[-3:]
    assert second.model.clip.max_frames == first.model.clip.max_frames
    steps_to(
        second.model.student.sampler.levels, steps=first.model.sampler.steps, shift=first.model.sampler.shift
    )


def test_one_setting_can_be_overridden_and_shapes_are_said_once():
    extra = (
        "--model.init_args.net.depth=3",
        "--data.clip.height=64",
        "--model.init_args.optimizer.init_args.lr=0.5",
    )
    cli = build(TEACHERS[0], HORIZONS[0], extra=(*extra, "--trainer.accelerator=cpu"))
    assert cli.model.net_config.depth == 3 and cli.model.clip.height == 64
    cli.model.configure_model()
    assert cli.model.configure_optimizers()["optimizer"].defaults["lr"] == 0.5


def test_a_teacher_starts_from_a_public_folder_named_on_the_command_line(tmp_path):
    plain = DiT(DiTConfig.tiny(control=None))
    tensors = TensorsInMemory(plain.state_dict())
    write_public(tmp_path / "wan", tensors, config=plain.config, layout="original")
    words = (
        f"--model.init_args.init.path={tmp_path / 'wan'}",
        "--model.init_args.init.missing=[control,words]",
        "--model.init_args.net.control.rays=0",
    )
    cli = build(TEACHERS[0], HORIZONS[0], extra=(*words, "--trainer.accelerator=cpu"))
    cli.model.configure_model()
    assert torch.equal(cli.model.net.dit.blocks[5].ffn[2].weight, plain.blocks[5].ffn[2].weight)


def test_a_plain_teacher_has_no_control_and_keeps_the_other_sizes():
    plain = build(TEACHERS[0], HORIZONS[0], PLAIN, extra=("--trainer.accelerator=cpu",)).model
    whole = build(TEACHERS[0], HORIZONS[0], extra=("--trainer.accelerator=cpu",)).model
    assert plain.net_config == replace(whole.net_config, control=None) and plain.first_latent == "noised"


@pytest.mark.parametrize(
    ("words", "tuning"),
    [
        ("{}", FullTuning()),
        ("{control_steps: 5}", ControlFirst(control_steps=5)),
        ("{rank: 8}", LowRank(rank=8)),
    ],
)
def test_the_ways_to_take_to_actions_are_values(words, tuning):
    extra = (
        f"--model.init_args.tuning={words}",
        "--data.plain={root: elsewhere, share: 0.25}",
        "--trainer.callbacks+=relic.callbacks.GapProbe",
        "--trainer.callbacks.plain={root: elsewhere}",
        "--trainer.callbacks.actions={root: here, validation_scenes: 1}",
        "--trainer.accelerator=cpu",
    )
    cli = build(TEACHERS[0], HORIZONS[0], extra=extra)
    assert cli.model.tuning == tuning
    probe = next(c for c in cli.trainer.callbacks if isinstance(c, GapProbe))
    assert (probe.plain, probe.actions.validation_scenes) == (HeldOut(root="elsewhere"), 1)


def test_checkpoints_live_beside_the_run_so_that_last_is_found():
    cli = build(
        TEACHERS[0], HORIZONS[0], extra=("--trainer.default_root_dir=runs/x", "--trainer.accelerator=cpu")
    )
    assert Path(cli.trainer.checkpoint_callback.dirpath).parts[-3:] == ("runs", "x", "checkpoints")


def test_an_unknown_key_stops_the_run_and_is_named(capsys):
    with pytest.raises(SystemExit):
        build(TEACHERS[0], HORIZONS[0], extra=("--model.init_args.prompt_dropuot=0.2",))
    assert "prompt_dropuot" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "message"), [("height=100", "multiple of 16"), ("horizons=[80]", "4k+1")])
def test_a_bad_shape_stops_the_run_before_it_starts(option, message, capsys):
    with pytest.raises(SystemExit):
        build(TEACHERS[0], HORIZONS[0], extra=(f"--data.clip.{option}", "--trainer.accelerator=cpu"))
    assert message in capsys.readouterr().err


def test_configs_are_found_by_name_and_a_missing_one_lists_its_neighbours():
    assert find_config("configs/net/tiny.yaml").is_file()
    with pytest.raises(FileNotFoundError, match=r"1b.yaml"):
        find_config("configs/net/2b.yaml")


def test_what_does_not_fit_is_told_in_a_line_and_what_fails_later_with_its_traceback(monkeypatch):
    words = [*("--config", str(TEACHERS[0]), "--config", str(HORIZONS[0]), "--data.root=nowhere")]
    words += ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    with pytest.raises(SystemExit, match="relic fit: no dataset at nowhere: the folder does not exist"):
        RelicCLI.run(["fit", *words])
    cli = build(TEACHERS[0], HORIZONS[0], extra=("--trainer.accelerator=cpu",))

    def fit(**words):
        for callback in cli.trainer.callbacks:
            callback.on_train_start(cli.trainer, cli.model)
        raise ValueError("in the middle")

    monkeypatch.setattr(cli.trainer, "fit", fit)
    with pytest.raises(ValueError, match="in the middle"):
        cli.fit()


class Cut(Exception):
    """Stands for a kill."""


def test_no_checkpoint_is_written_between_accumulated_gradients(tmp_path):
    class CutAfter(Callback):
        def __init__(self, batches: int) -> None:
            self.left = batches

        def on_train_batch_start(self, *args) -> None:
            if not self.left:
                raise Cut
            self.left -= 1

    def fit(batches: int, resume: str | None) -> int:
        keeper = Checkpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)
        trainer = Trainer(
            max_steps=6, accelerator="cpu", accumulate_grad_batches=4, logger=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            limit_val_batches=0, callbacks=[keeper, CutAfter(batches)], default_root_dir=tmp_path,
        )  # fmt: skip
        module = TeacherExtension(net=NANO, clip=NANO_CLIP, words=NANO_WORDS)
        with pytest.raises(Cut):
            trainer.fit(module, LatentWorld(batches=24), ckpt_path=resume)
        state = torch.load(tmp_path / "last.ckpt", weights_only=False)
        return state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]

    assert fit(9, None) == 8
    assert fit(2, str(tmp_path / "last.ckpt")) == 8  # Lightning's own would have written one after 9


def test_checkpoints_do_not_wait_for_a_validation():
    cli = build(TEACHERS[0], HORIZONS[0], extra=("--trainer.accelerator=cpu", "--data.validation_scenes=0"))
    keeper = next(c for c in cli.trainer.callbacks if isinstance(c, Checkpoint))
    assert keeper._every_n_train_steps == 100 and keeper.save_last


def test_the_autoencoder_of_a_teacher_is_the_one_its_latents_are_checked_against():
    words = ("--trainer.accelerator=cpu", "--model.init_args.vae=some.safetensors")
    cli = build(TEACHERS[0], HORIZONS[0], extra=words)
    assert cli.datamodule.vae == cli.model.vae_path == "some.safetensors"


RECOMMENDED = {"1b": "gpu8_sharded", "14b": "gpu32_sharded"}


@pytest.mark.parametrize("size", RECOMMENDED)
def test_batches_of_a_recipe_can_be_shared_by_the_gpus_that_its_header_names(size):
    trainer = yaml.safe_load((ROOT / "trainer" / f"{RECOMMENDED[size]}.yaml").read_text())["trainer"]
    assert RECOMMENDED[size] in (ROOT / "teacher" / f"{size}.yaml").read_text()
    ranks = trainer["devices"] * trainer.get("num_nodes", 1)
    cli = build(ROOT / "teacher" / f"{size}.yaml", HORIZONS[0], extra=("--trainer.accelerator=cpu",))
    data = cli.datamodule
    assert data.global_batch % ranks == data.validation_windows % ranks == 0
    assert data.batches_per_epoch % cli.trainer.accumulate_grad_batches == 0


# -- arms of the comparison -------------------------------------------------------------------------------

ARMS = ROOT.parent / "benchmarks" / "arms.yaml"
POLICIES = {
    "compressed": Compressed(),
    "window_8": Window(latents=8),
    "window_20": Window(latents=20),
    "full": Full(),
    "full_ode_pairs": Full(),
    "full_longer": Full(),
    "full_longest": Full(),
    "fourths": Compressed(window=4, schedule=(1, 4, 4, 4)),
    "fourths_from_full": Compressed(window=4, schedule=(1, 4, 4, 4)),
    "keyframes": Compressed(schedule=(1, 0, 0, 0, 0, 0)),
}


def test_every_arm_of_the_comparison_is_a_student_that_can_be_fitted(tmp_path):
    arms = yaml.safe_load(ARMS.read_text())
    assert POLICIES.keys() <= arms.keys()
    for name, arm in arms.items():
        settings = {"net": arm.get("network", {}), **arm.get("student", {}), **arm.get("causal_init", {})}
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"model": {"init_args": settings}}))
        model = build(CAUSAL_INITS[0], config, extra=("--data.clip.block_latents=2",)).model
        assert model.student.policy == POLICIES.get(name, Compressed())
        assert model.net_config.control.poses == (name != "no_pose")
        assert model.forcing == ("hybrid" if name == "hybrid" else "teacher")
        known = {"network", "student", "causal_init", "self_forcing_5s", "self_forcing_20s"}
        assert arm.keys() <= known | {"pairs", "of", "from", "until"}
        assert arm.get("of", name) in arms
        chain = [name]
        while base := arms[chain[-1]].get("from"):
            assert base not in chain and "of" not in arms[base]
            chain.append(base)
        assert arm.get("until", "causal_init") in known
