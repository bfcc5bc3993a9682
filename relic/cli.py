"""The command line: the stages of LightningCLI (`relic fit` and so on), and one verb per file of `verbs`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["find_config", "main"]

STAGES = {
    "fit": "fit a stage: relic fit --config configs/teacher/tiny.yaml --data.root runs/latents",
    "validate": "measure a checkpoint on the validation scenes",
    "test": "measure a checkpoint on the evaluation scenes",
    "predict": "write sampled videos of the evaluation scenes",
}
VERBS = {
    "render": "render an action-labelled data set with the embedded engine",
    "inspect": "print and draw the card of a data set",
    "encode": "encode a data set into latent shards",
    "ode-pairs": "solve a teacher's flow ODE: the states that a student first learns from",
    "report": "sample clips with a fitted teacher and lay them beside the truth",
    "export": "write the bundle of a fitted student that relic.World reads",
    "rollout": "roll a world out from an image along a script of actions",
    "evaluate": "play a suite of scripted paths and score memory and motion against the engine",
    "convert": "convert weights between public Wan2.1 layouts and relic's own files",
    "demo": "walk through the shipped world; render, fit and sample a smaller one, with a report",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; only the code that it needs is imported."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in STAGES:
        run_stage(words)
    elif command in VERBS:
        run_verb(command, words[1:])
    elif command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(importlib.import_module("relic").__version__)
    else:
        sys.exit(f"relic: {command!r} is not a command.\n\n{usage()}")


def usage() -> str:
    """Return the list of commands."""
    rows = [f"  {name:<10} {text}" for name, text in {**STAGES, **VERBS}.items()]
    return "usage: relic COMMAND [options]     (relic COMMAND --help shows the options)\n\n" + "\n".join(rows)


def find_config(path: str) -> Path:
    """Return a config given as a path; one that starts with `configs/` is also found in an installed package.

    Raises:
        FileNotFoundError: If there is none, naming what exists in that folder.
    """
    here = Path(path)
    packaged = Path(__file__).parent / path
    checkout = Path(__file__).parent.parent / path
    for candidate in (here, packaged, checkout):
        if candidate.is_file() and (candidate is here or path.startswith("configs/")):
            return candidate
    folder = next((c.parent for c in (here, packaged, checkout) if c.parent.is_dir()), None)
    known = ", ".join(sorted(p.name for p in folder.glob("*.yaml"))) if folder else "nothing"
    raise FileNotFoundError(f"No config {path}; {folder or here.parent} holds {known}.")


def run_stage(words: list[str]) -> None:
    """Run fit, validate, test or predict."""
    from relic.stages import RelicCLI  # loads torch and Lightning

    for i, word in enumerate(words[:-1]):
        if word in ("--config", "-c"):
            words[i + 1] = str(find_config(words[i + 1]))
    sys.argv[1:] = words  # further ranks are started with the same words
    RelicCLI.run(None)


def find_verb(name: str) -> Callable[..., Any]:
    """Return the function of a verb; it is called as its file is, with underscores for dashes."""
    python_name = name.replace("-", "_")
    function: Callable[..., Any] = getattr(importlib.import_module(f"relic.verbs.{python_name}"), python_name)
    return function


def run_verb(name: str, words: list[str]) -> None:
    """Run a verb: parameters before its `*` are positional on the command line, the others are options."""
    from jsonargparse import ArgumentParser

    function = find_verb(name)
    parameters = inspect.signature(function).parameters.values()
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY}
    parser = ArgumentParser(prog=f"relic {name}", description=(function.__doc__ or "").split("\n\n")[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=options)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=positional)
    try:
        function(**parser.instantiate(parser.parse_args(_join_tuples(function, words))).as_dict())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"relic {name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"relic {name}: stopped; run the same command to go on.")


def _join_tuples(function: Callable[..., Any], words: list[str]) -> list[str]:
    """Let tuples be written as words: `--size 128 256` becomes `--size [128,256]`, strings in quotes."""
    hints = {f"--{name}": hint for name, hint in get_type_hints(function).items()}
    tuples = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is tuple}
    joined: list[str] = []
    rest = iter(words)
    word = next(rest, None)
    while word is not None:
        joined.append(word)
        following = next(rest, None)
        if word in tuples and following is not None and not following.startswith("["):
            values = []
            while following is not None and not following.startswith("--"):
                values.append(following)
                following = next(rest, None)
            quote = json.dumps if str in tuples[word] else str
            joined.append(f"[{','.join(map(quote, values))}]")
        word = following
    return joined


if __name__ == "__main__":
    main()
