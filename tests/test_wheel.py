"""What pip installs works away from the checkout: code, types and configs are in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    """Run this Python from another folder, with an installed package on its path or none."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else; its dependencies are those of this Python."""
    folder = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_module_every_config_and_the_typing_marker(wheel):
    held = set(ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "relic").rglob("*.py")}
    configs = {f"relic/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs and "relic/py.typed" in held
    assert modules | configs <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/"))]


def test_an_installed_relic_is_found_instead_of_the_checkout(site, tmp_path):
    found = run("-c", "import relic; print(relic.__file__)", cwd=tmp_path, path=site)
    assert Path(found) == site / "relic" / "__init__.py"


@pytest.mark.parametrize("config", ["configs/teacher/tiny.yaml", "configs/trainer/cpu.yaml"])
def test_an_installed_relic_finds_its_configs(site, tmp_path, config):
    code = f"from relic.cli import find_config; print(find_config({config!r}))"
    found = Path(run("-c", code, cwd=tmp_path, path=site))
    assert found == site / "relic" / config
    assert found.read_text() == (ROOT / config).read_text()


def test_an_installed_relic_holds_its_world(site, tmp_path):
    code = "import relic; world = relic.World.load('tiny'); print(world.start().step)"
    assert "Session.step" in run("-c", code, cwd=tmp_path, path=site)


def test_an_installed_relic_shows_its_commands(site, tmp_path):
    assert "relic COMMAND" in run("-m", "relic.cli", "--help", cwd=tmp_path, path=site)
    assert run("-m", "relic.cli", "--version", cwd=tmp_path, path=site)
    assert (site / "bin" / "relic").exists()
