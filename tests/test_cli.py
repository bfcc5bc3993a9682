import subprocess
import sys
from pathlib import Path

import pytest

from relic import cli
from relic.cli import STAGES, VERBS, _join_tuples, find_verb, main


def test_every_verb_has_its_file_and_its_function():
    folder = Path(cli.__file__).parent / "verbs"
    files = {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")}
    assert files == set(VERBS)
    assert all(callable(find_verb(name)) for name in VERBS)


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from relic.cli import main; main(['--help']); "
        "assert not {'torch', 'lightning', 'panda3d'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in (*STAGES, *VERBS))


def test_an_unknown_command_is_named_beside_those_that_exist():
    with pytest.raises(SystemExit, match="'rendre' is not a command"):
        main(["rendre"])


def test_tuples_are_written_as_words():
    def verb(*, size: tuple[int, int] = (1, 2), seed: int = 0) -> None: ...

    verb.__annotations__ = {"size": tuple[int, int], "seed": int}
    assert _join_tuples(verb, ["--size", "128", "256", "--seed", "3"]) == [
        "--size",
        "[128,256]",
        "--seed",
        "3",
    ]
    assert _join_tuples(verb, ["--seed", "3", "--size", "128", "256"]) == [
        "--seed",
        "3",
        "--size",
        "[128,256]",
    ]
    assert _join_tuples(verb, ["--size", "[1,2]"]) == ["--size", "[1,2]"]


def test_words_of_a_tuple_may_hold_commas_and_colons():
    def verb(*, policy: tuple[str, ...] = ()) -> None: ...

    verb.__annotations__ = {"policy": tuple[str, ...]}
    joined = _join_tuples(verb, ["--policy", "own", "compressed:4:1,2"])
    assert joined == ["--policy", '["own","compressed:4:1,2"]']


def test_a_verb_that_fails_says_why_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match=r"relic inspect: .*does not exist"):
        main(["inspect", str(tmp_path / "nowhere")])


def test_verbs_document_every_option(capsys):
    for name in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(required, type: " in text or "default: " in text
