"""A small world from nothing, on one GPU: every stage as a `relic` command, each with its seconds.

    render, autoencoder, encode (5 s, 20 s), teacher (5 s, then 20 s), ODE pairs if an arm learns from them,
    causal init, self-forcing (5 s, then 20 s), the bundles, their evaluation

Students of all arms (arms.yaml) and seeds share one teacher and one set of pairs, unless an arm has another
network. Several GPUs fit the autoencoder and the teachers together, and share windows, ODE pairs and
students.
A stage is left out if its product is there, and a stopped one goes on, so the run can be cut into pieces:
`--until teacher_5s` ends after that stage. Weights lie beside the logs of each stage; seconds are in
seconds.json.

    python benchmarks/world.py runs/world --seeds 0
    python benchmarks/world.py runs/world --arm compressed window_8 full --gpus 0 1 2 3 --seeds 0 1 2
    python benchmarks/world.py runs/tried --device cpu --processes 2 --workers 0 --size 64 96 --cases 1 \
        --scenes 5 --minutes 6 --held 1 1 --seeds 0 1 --steps 4 --windows 5 --frames 33 65 --strides 4 6 \
        --batch '{"5s": 4, "20s": 2, "causal_init": 2, "self_forcing_5s": 2, "self_forcing_20s": 2}'
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import describe_machine

from relic.cli import find_config
from relic.data.claim import in_turn

SECONDS = {
    "autoencoder": 130,
    "teacher_5s": 200,
    "teacher_20s": 170,
    "causal_init": 200,
    "self_forcing_5s": 40,
    "self_forcing_20s": 120,
}
FORCING: dict[str, Any] = {  # the critic has little time to catch up, and captions say little
    "critic_only_steps": 40, "critic_ratio": 4, "guidance": 1.0,
    "critic_optimizer": {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1.0e-4, "betas": [0.0, 0.999], "weight_decay": 0.01},
    },
}  # fmt: skip
RATES = {"5s": 2e-3, "20s": 1e-3}  # of the teachers
NET = yaml.safe_load(find_config("configs/net/tiny.yaml").read_text())
STUDENTS = ("causal_init", "self_forcing_5s", "self_forcing_20s")  # each goes on from the one before
YARN = 81 / 21
TURNED = 0.3  # share of windows that go back the way they came
REMEMBERED = ("out_and_back", "look_away", "turn_round", "loop")  # groups of scripts that ask for memory
VALIDATION, EVALUATION = 8, 64  # scenes that nothing is fitted on


class Chain:
    """Runs stages in the folder `root`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.root = args, Path(args.out)
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "logs").mkdir(exist_ok=True)
        self.vae = self.root / "autoencoder" / "tiny_vae.safetensors"
        self.clips = self.root / "clips"

    def run(
        self,
        name: str,
        product: Path | Sequence[Path],
        commands: Sequence[Sequence[object]],
        *,
        at_a_time: int | None = None,
        whole: bool = False,
        threads: int | None = None,
    ) -> None:
        """Run the commands of a stage, so many at a time (all by default), unless its products are there.

        If each command has a product of its own, those are left out whose product is there. whole: each
        command sees all GPUs; else one, in turn. threads: of each command.
        """
        products = [product] if isinstance(product, Path) else product
        if len(products) == len(commands):
            lacking = [number for number, path in enumerate(products) if not path.exists()]
            if lacking:
                products, commands = ([each[i] for i in lacking] for each in (products, commands))
        if all(path.exists() for path in products):
            print(f"{name}: there already", flush=True)
        else:
            start = time.monotonic()
            print(f"{name} ...", flush=True)
            logs = [self.root / "logs" / f"{path.parent.name}.log" for path in products]
            if len(logs) != len(commands):
                logs = [self.root / "logs" / f"{name}.log"] * len(commands)
            for at in range(0, len(commands), at_a_time or len(commands)):
                part = slice(at, at + (at_a_time or len(commands)))
                gpus = self.args.gpus
                places = [gpus if whole else [gpus[i % len(gpus)]] for i in range(len(commands[part]))]
                jobs = zip(commands[part], logs[part], places, strict=True)
                running = [begin(words, log, gpus=seen, threads=threads) for words, log, seen in jobs]
                ends = [process.wait() for process in running]
                for log, end in zip(logs[part], ends, strict=True):
                    if end:
                        sys.exit(f"{name} failed (exit status {end}), see {log}:\n{log.read_text()[-4000:]}")
            self.note(name, time.monotonic() - start)

    def end(self, stage: str) -> None:
        """Stop here if this is the last stage that was asked for."""
        if stage == self.args.until:
            sys.exit(0)

    def note(self, name: str, seconds: float) -> None:
        """Add the seconds of a stage to those of the other pieces of the run."""
        path = self.root / "seconds.json"
        with in_turn(self.root):
            known = json.loads(path.read_text()) if path.exists() else {"machine": describe_machine()}
            known[name] = known.get(name, 0) + round(seconds, 1)
            path.write_text(json.dumps(known, indent=1))
        print(f"{name}: {seconds:.0f} s", flush=True)

    def fit(self, stage: str, folder: Path, data: Path, settings: dict[str, Any]) -> list[object]:
        """Return the command that fits a stage; what differs from the shipped config is written beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        kind = stage.removesuffix("_5s").removesuffix("_20s")
        name = "small" if kind == "autoencoder" else "tiny"
        words: list[object] = ["fit", "--config", find_config(f"configs/{kind}/{name}.yaml")]
        if stage != kind:
            horizon = stage.removeprefix(f"{kind}_")
            words += ["--config", find_config(f"configs/{kind}/horizon/{horizon}.yaml")]
        words += ["--config", find_config(f"configs/trainer/{self.args.device}.yaml")]
        clip = {
            "height": self.args.size[0], "width": self.args.size[1], "block_latents": self.args.block_latents,
        }  # fmt: skip
        if self.args.frames and kind != "autoencoder":
            clip["horizons"] = [self.args.frames["5s" not in stage]]
        minutes, seconds = divmod(self.args.seconds[stage], 60)
        known = {
            "data": {
                "root": str(data), "clip": clip, "validation_scenes": self.args.held[0],
                "evaluation_scenes": self.args.held[1], "validation_windows": 1,
                "workers": self.args.workers,
            },
            "trainer": {
                "default_root_dir": str(folder), "max_time": f"00:00:{minutes:02d}:{seconds:02d}",
                "enable_progress_bar": False, "log_every_n_steps": 10, "num_sanity_val_steps": 0,
                "max_steps": self.args.steps or -1,
            },
            "checkpoint": {"every_n_train_steps": 500},
        }  # fmt: skip
        config = folder / "settings.yaml"
        config.write_text(yaml.safe_dump(merged(known, settings)))
        words += ["--config", config]
        if (folder / "checkpoints" / "last.ckpt").exists():
            words += ["--ckpt_path", "last"]
        return words

    # -- stages ----------------------------------------------------------------------------------------------

    def data(self) -> None:
        a = self.args
        render = [
            "render",
            "--out",
            self.clips,
            "--scenes",
            a.scenes,
            "--minutes",
            a.minutes,
            "--size",
            *a.size,
        ]
        self.run(
            "render", self.clips / "index.parquet", [[*render, "--seed", a.seed, "--workers", a.processes]]
        )
        self.end("render")
        settings = {"ema_decay": 0.995, **self.started("autoencoder", "tiny_vae")}
        given = {"model": {"init_args": settings}, "data": {"global_batch": a.batch["autoencoder"]}}
        fit = self.fit("autoencoder", self.vae.parent, self.clips, self.together(given))
        self.run("autoencoder", self.vae, [fit], whole=True)
        self.end("autoencoder")
        parts = len(a.gpus)
        commands, products = [], []
        for name, frames, stride in zip(("5s", "20s"), self.horizons, a.strides, strict=True):
            out = self.root / f"latents_{name}"
            products.append(out / "index.parquet")
            commands += [
                ["encode", self.clips, "--out", out, "--vae", self.vae, "--horizon", frames,
                 "--stride_seconds", stride, "--workers", max(1, a.processes // (2 * parts)),
                 "--palindromes", TURNED, "--part", part, parts]
                for part in range(parts)
            ]  # fmt: skip
        self.run("encode", products, commands)
        self.end("encode")

    def together(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return settings of a fit, for all GPUs; each needs a window of its own to validate on."""
        count = len(self.args.gpus)
        if count == 1:
            return given
        known = {
            "trainer": {"devices": count, "strategy": "ddp"}, "data": {"validation_windows": count},
        }  # fmt: skip
        return merged(known, given)

    @property
    def horizons(self) -> Sequence[int]:
        return self.args.frames or (81, 321)

    def teachers(self) -> None:
        for horizon, before in (("5s", None), ("20s", "5s")):
            stage = f"teacher_{horizon}"
            for arm in self.owners:
                settings: dict[str, Any] = {
                    "net": self.net(arm), "vae": str(self.vae),
                    "compute": {"compile_blocks": self.args.device == "gpu", "residual": self.residual},
                    "optimizer": {"init_args": {"lr": RATES[horizon]}},
                }  # fmt: skip
                if before:
                    settings["net"] |= {"rope_factor": YARN}
                    settings["init"] = {"path": str(self.teacher(before, arm)), "rope_factor": "restate"}
                settings |= self.started(stage, "teacher")
                data = {"global_batch": self.args.batch[horizon]}
                given = self.together({"model": {"init_args": settings}, "data": data})
                product = self.teacher(horizon, arm)
                command = self.fit(stage, product.parent, self.root / f"latents_{horizon}", given)
                self.run(product.parent.name, product, [command], whole=True)
            self.end(stage)

    def started(self, stage: str, kind: str) -> dict[str, Any]:
        """Return the setting that goes on from an earlier run, if one is given."""
        before = Path(self.args.start or ".", stage, f"{kind}.safetensors")
        return {"init": {"path": str(before)}} if self.args.start else {}

    # -- whose files are where -------------------------------------------------------------------------------

    @property
    def residual(self) -> str:
        return "bfloat16" if self.args.device == "gpu" else "float32"

    @property
    def owners(self) -> list[str]:
        """The arms that teachers and pairs are made for: each for itself, or one for all that share."""
        own = [arm for arm in self.args.arm if "network" in self.args.arms[arm]]
        others = [arm for arm in self.args.arm if arm not in own]
        return others[:1] + own

    @property
    def paired(self) -> list[str]:
        """The arms that ODE pairs are made for."""
        with_pairs = [arm for arm in self.args.arm if self.args.arms[arm].get("pairs")]
        return [arm for arm in self.owners if self.pairs_of(arm) in map(self.pairs_of, with_pairs)]

    def pairs_of(self, arm: str) -> Path:
        return self.shared("pairs", arm)

    def net(self, arm: str) -> dict[str, Any]:
        """Sizes of all networks of an arm."""
        return merged(NET, self.args.arms[arm].get("network", {}))

    def shared(self, name: str, arm: str) -> Path:
        """Return the folder of what arms share unless they have another network."""
        return self.root / (f"{name}_{arm}" if "network" in self.args.arms[arm] else name)

    def teacher(self, horizon: str, arm: str) -> Path:
        return self.shared(f"teacher_{horizon}", arm) / "teacher.safetensors"

    def student(self, stage: str, arm: str, seed: int) -> Path:
        return self.root / f"{stage}_{arm}_seed{seed}" / "student.safetensors"

    @property
    def fitted(self) -> list[tuple[str, int]]:
        """Arms and seeds of all students that are fitted: those that are a stage of another arm are not."""
        return [which for which in self.shown if "of" not in self.args.arms[which[0]]]

    @property
    def shown(self) -> list[tuple[str, int]]:
        """Arms and seeds of all worlds."""
        return [(arm, seed) for arm in self.args.arm for seed in self.args.seeds]

    # -- students --------------------------------------------------------------------------------------------

    def pairs(self) -> None:
        parts = len(self.args.gpus) * (2 if self.args.device == "gpu" else 1)
        for arm in self.paired:
            out = self.pairs_of(arm)
            words = ["ode-pairs", self.teacher("20s", arm), "--latents", self.root / "latents_20s"]
            words += ["--out", out, "--horizon", self.horizons[1], "--windows", self.args.windows]
            words += ["--batch", 16, "--prefix_share", 0.5]
            commands = [[*words, "--part", part, parts] for part in range(parts)]
            self.run(out.name, out / "index.parquet", commands)
        self.end("pairs")

    def students(self) -> None:
        stages = [stage for stage in STUDENTS if stage not in self.args.skip]
        for stage, before in zip(stages, [None, *stages], strict=False):
            left = self.fitted
            while left:  # those that go on from others wait for them
                fitted = [which for which in left if self.before(stage, before, *which).exists()]
                if not fitted:
                    sys.exit(
                        f"{stage} of {', '.join(arm for arm, _ in left)}: what they go on from is missing."
                    )
                left = [which for which in left if which not in fitted]
                commands = [self.fit_student(stage, before, arm=arm, seed=seed) for arm, seed in fitted]
                products = [self.student(stage, *which) for which in fitted]
                name = "_".join(dict.fromkeys([stage, *(arm for arm, _ in fitted)]))
                self.run(name, products, commands, at_a_time=len(self.args.gpus))
            self.end(stage)

    def before(self, stage: str, before: str | None, arm: str, seed: int) -> Path:
        """Return the weights that a stage of a student goes on from."""
        if before is not None:
            return self.student(before, arm, seed)
        base = self.args.arms[arm].get("from")
        return self.student(stage, base, seed) if base else self.teacher("20s", arm)

    def fit_student(self, stage: str, before: str | None, *, arm: str, seed: int) -> list[object]:
        """Return the command that fits a stage of a student."""
        start = self.before(stage, before, arm, seed)
        settings: dict[str, Any] = {
            "net": {**self.net(arm), "rope_factor": YARN},
            "vae": str(self.vae), "seed": seed, "init": {"path": str(start)},
            "cuda_graphs": self.args.device == "gpu", "compute": {"residual": self.residual},
        }  # fmt: skip
        paired = before is None and self.args.arms[arm].get("pairs", False)
        data = self.pairs_of(arm) if paired else self.root / "latents_20s"
        if before is None:  # a step of whole clips, again and again
            settings["compute"]["compile_blocks"] = self.args.device == "gpu"
        else:
            horizon = stage.removeprefix("self_forcing_")
            settings |= self.args.forcing
            settings["teacher"] = {"path": str(self.teacher(horizon, arm))}
            settings["teacher_rope_factor"] = 1.0 if horizon == "5s" else YARN
            data = self.root / f"latents_{horizon}"
        changes = self.args.arms[arm]
        settings = merged(merged(settings, changes.get("student", {})), changes.get(stage, {}))
        given = {
            "model": {"init_args": settings},
            "data": {
                "seed": seed, "global_batch": self.args.batch[stage],
                "content": "trajectory" if paired else "latents",
            },
        }  # fmt: skip
        return self.fit(stage, self.student(stage, arm, seed).parent, data, given)

    def bundles(self) -> None:
        commands, products = [], []
        for arm, seed in self.shown:
            known = {"until": "self_forcing_20s", "of": arm, **self.args.arms[arm]}
            out, student = self.bundle(arm, seed), self.student(known["until"], known["of"], seed)
            commands.append(["export", student, "--vae", self.vae, "--data", self.clips, "--out", out])
            products.append(out / "world.yaml")
        self.run("_".join(["bundles", *self.args.arm]), products, commands)
        self.end("bundles")

    def bundle(self, arm: str, seed: int) -> Path:
        return self.root / "bundles" / f"{arm}_seed{seed}"

    def evaluation(self) -> None:
        """Play what is asked of memory with all worlds, in scenes of another seed, and write the report."""
        a = self.args
        if not a.cases:
            return
        seeds = "".join(map(str, a.seeds))
        out = self.root / "_".join(["evaluation", *a.arm, f"seeds{seeds}", f"{a.cases}scenes"])
        first, *others = [self.bundle(*which) for which in self.shown]
        words = ["evaluate", first, "--out", out, "--groups", *REMEMBERED, "--scenes", a.cases]
        words += ["--seconds", *([10, 20] if self.horizons[1] >= 321 else [4])]
        words += ["--beside", *others] if others else []
        words += ["--lpips", a.lpips] if a.lpips else []
        commands = [[*words, "--part", part, a.processes] for part in range(a.processes)]
        self.run(out.name, out / "report.json", commands, threads=1)


def begin(
    command: Sequence[object], log: Path, *, gpus: Sequence[int], threads: int | None
) -> subprocess.Popen[bytes]:
    """Start a relic command that sees these GPUs and adds what it says to a file."""
    words = [str(word) for word in command]
    with log.open("a") as out:
        out.write(f"$ relic {shlex.join(words)}\n")
        out.flush()
        command = [sys.executable, "-m", "relic.cli", *words]
        known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        seen = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(known[i] if known else str(i) for i in gpus)}
        if threads:
            seen |= {"OMP_NUM_THREADS": str(threads), "OPENCV_FOR_THREADS_NUM": str(threads)}
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=seen)


def merged(known: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with nested changes."""
    both = dict(known)
    for name, value in changes.items():
        deeper = isinstance(value, dict) and isinstance(known.get(name), dict)
        both[name] = merged(known[name], value) if deeper else value
    return both


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="folder for everything")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--scenes", type=int, default=360)
    parser.add_argument("--minutes", type=float, default=480.0, help="of video, over all scenes")
    parser.add_argument("--block_latents", type=int, default=2, help="of what a student generates at a time")
    parser.add_argument("--held", type=int, nargs=2, default=[VALIDATION, EVALUATION], help="scenes held out")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="what a stage can share out")
    parser.add_argument("--windows", type=int, default=1024, help="ODE pairs")
    parser.add_argument("--strides", type=float, nargs=2, default=[5.0, 8.0], help="seconds between windows")
    parser.add_argument("--frames", type=int, nargs=2, help="other horizons than 81 and 321 frames")
    parser.add_argument("--steps", type=int, help="most steps of every fit")
    parser.add_argument("--seconds", type=json.loads, default={}, help=f"of each fit, JSON; else {SECONDS}")
    parser.add_argument("--batch", type=json.loads, default={}, help="of each stage, JSON")
    parser.add_argument("--forcing", type=json.loads, default={}, help="settings of self-forcing, JSON")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--processes", type=int, default=16, help="that render and decode")
    parser.add_argument("--workers", type=int, default=4, help="reading processes of each fit")
    parser.add_argument("--arm", nargs="+", default=["compressed"], help="of arms.yaml, beside this script")
    parser.add_argument("--cases", type=int, default=8, help="evaluate with so many scenes a script; 0: not")
    parser.add_argument("--lpips", help="file with torchvision's AlexNet")
    parser.add_argument("--start", help="an earlier run: autoencoder and teachers go on from its weights")
    parser.add_argument("--skip", nargs="+", default=[], choices=STUDENTS[1:-1], help="stages left out")
    parser.add_argument("--until", help="the last stage to run")
    args = parser.parse_args()
    args.arms = yaml.safe_load(Path(__file__).with_name("arms.yaml").read_text())
    unknown = [arm for arm in args.arm if arm not in args.arms]
    if unknown:
        parser.error(f"--arm {', '.join(unknown)} is none of {', '.join(args.arms)}.")
    for arm in args.arm:
        whole = args.arms[arm].get("of", arm)
        if whole not in args.arm:
            parser.error(f"--arm {arm} is a stage of {whole}: name that one too.")
    args.seconds = {**SECONDS, **args.seconds}
    args.forcing = {**FORCING, **args.forcing}
    args.batch = {
        "autoencoder": 32, "5s": 32, "20s": 12,
        "causal_init": 8, "self_forcing_5s": 16, "self_forcing_20s": 8, **args.batch,
    }  # fmt: skip
    for stage in ("autoencoder", *RATES):
        if args.batch[stage] % len(args.gpus):
            parser.error(
                f"a batch of {args.batch[stage]} ({stage}) can't be shared by {len(args.gpus)} GPUs."
            )
    print(describe_machine(), flush=True)
    chain = Chain(args)
    for arm in args.arm:
        base = args.arms[arm].get("from")
        if base is None:
            continue
        begun = all(chain.student(STUDENTS[0], base, seed).exists() for seed in args.seeds)
        if not begun and (base not in args.arm or "of" in args.arms[base]):
            parser.error(f"--arm {arm} goes on from {base}, which must be fitted before or with it.")
    for stages in (
        chain.data, chain.teachers, chain.pairs, chain.students, chain.bundles, chain.evaluation
    ):  # fmt: skip
        stages()


if __name__ == "__main__":
    main()
