"""Who may import whom. docs/design.md gives the reasons; this table is the rule."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "relic"
FILES = sorted(ROOT.rglob("*.py"))
ANYTHING = {"verbs", "cli", "stages"}  # the command line: may import anything, and nobody else imports it
LONG = 400  # lines


class May(NamedTuple):
    """What a package may import: other parts of relic (and itself), and third parties."""

    relic: set[str]
    others: set[str]


MATHS = {"torch", "einops"}
TABLE = {
    "types": May(set(), MATHS),
    "ops": May({"types"}, MATHS),
    "nn": May({"types", "ops"}, MATHS | {"safetensors", "numpy", "flash_attn", "flash_attn_interface"}),
    "rollout": May({"types", "ops", "nn"}, MATHS),
    "session": May({"types", "ops", "nn", "rollout"}, MATHS),
    "world": May(
        {"types", "ops", "nn", "rollout", "session"}, MATHS | {"safetensors", "numpy", "yaml", "PIL"}
    ),
    "engine": May({"types", "ops"}, MATHS | {"panda3d", "direct", "av", "numpy"}),
    "metrics": May(
        {"types", "ops"},
        MATHS | {"torchmetrics", "lpips", "cv2", "pycolmap", "scipy", "numpy", "safetensors"},
    ),
    "data": May({"types", "ops"}, MATHS | {"webdataset", "numpy", "av", "pyarrow", "fsspec", "PIL"}),
    "parallel": May({"types", "nn"}, MATHS),
    "modules": May({"types", "ops", "nn", "rollout", "parallel"}, MATHS | {"lightning", "torchmetrics"}),
    "callbacks": May(
        {"types", "ops", "metrics", "data"},
        MATHS | {"lightning", "torchmetrics", "numpy", "PIL", "matplotlib", "tensorboard"},
    ),
    "suite": May(
        {
            "types",
            "ops",
            "engine",
            "metrics",
            "data",
            "session",
            "world",
        },  # data: one way to read and write mp4
        MATHS | {"numpy", "yaml", "safetensors", "PIL", "matplotlib", "tqdm"},
    ),
    "serve": May(
        {"types", "ops", "session", "world"},
        MATHS
        | {"fastapi", "starlette", "uvicorn", "websockets", "pydantic", "gymnasium", "numpy", "PIL", "av"},
    ),
}
# what one file of a package may import and the others may not
ONLY_HERE = {
    "nn/text.py": {"transformers"},
    "nn/tuning.py": {"peft"},  # inside a function: optional
    "data/datamodule.py": {"lightning"},
    "parallel/strategy.py": {"lightning"},
    "modules/autoencoder.py": {"lpips", "torchvision"},  # a loss on pictures, not a metric
}


def part_of(path: Path) -> str:
    """The row of the table that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """All imported modules with their lines, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports in full, from relic.…"
            if node.module == "relic":
                yield from ((f"relic.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def offences(name: str, source: str) -> list[str]:
    """What a file (name from relic/ on) imports and may not."""
    part = part_of(ROOT / name)
    if part in ANYTHING:
        return []
    may = May({"world"}, set()) if name == "__init__.py" else TABLE[part]  # relic.World, loaded when used
    found = []
    for module, line in imports(ast.parse(source)):
        top, *below = module.split(".")
        if top == "relic":
            allowed = not below or below[0].startswith("__") or below[0] in may.relic | {part}
        else:
            allowed = top in sys.stdlib_module_names | may.others | ONLY_HERE.get(name, set())
        if not allowed:
            found.append(f"relic/{name}:{line} imports {module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(path):
    assert not offences(path.relative_to(ROOT).as_posix(), path.read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ops/flow.py", "from relic.nn.dit import DiT"),
        ("ops/flow.py", "import numpy"),
        ("nn/dit.py", "import transformers"),
        ("nn/dit.py", "from lightning import LightningModule"),
        ("data/reader.py", "def late():\n    from relic.nn import attention"),
        ("data/reader.py", "from lightning.pytorch import LightningDataModule"),
        ("engine/scenes.py", "from relic.data.schema import JSON"),
        ("serve/app.py", "from relic.modules import TeacherExtension"),
        ("rollout.py", "from relic.session import Session"),
        ("modules/base.py", "from relic import cli"),
        ("callbacks/panel.py", "from relic.modules.base import RelicModule"),
        ("__init__.py", "import torch"),
    ],
)
def test_an_import_that_climbs_is_found(name, source):
    assert len(offences(name, source)) == 1


def test_every_package_has_a_row_in_the_table():
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(TABLE) | ANYTHING


def test_the_table_has_no_circles():
    for part, may in TABLE.items():
        assert all(part not in TABLE[lower].relic for lower in may.relic)


def test_importing_relic_loads_neither_torch_nor_lightning():
    code = "import relic, sys; print(*{'torch', 'lightning', 'numpy', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_long_files_say_why_they_are_long():
    """Warn only: a long file is a question to its author, not an error. Its first line answers it."""
    for path in FILES:
        source = path.read_text()
        lines = source.count("\n")
        first = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
        if lines > LONG and "long" not in first:
            warnings.warn(
                f"{path.relative_to(ROOT.parent)} has {lines} lines: split it, or say in its first line why "
                "it is long.",
                stacklevel=1,
            )
