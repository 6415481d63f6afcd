"""The commands of the guides: their files, options and keys are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.errors import HydraException

from nemo_lrpo.config.loader import compose

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("README.md", "slurm/README.md", "nemo_lrpo/training/FAULTS.md")
CONFIGS = {name: name for name in ("train", "train_offline", "train_sft", "evaluate", "serve_rewards")}
CONFIGS |= {"preflight": "train"}
"""Entry point -> its configuration."""
ELSEWHERE = ("results/", "run_dir/", "build/", "logs/")
"""Beginnings of paths that a run makes."""


def commands(guide: str) -> Iterator[list[str]]:
    """The words of every command in a guide's blocks of code, up to its comment, `&&` or pipe."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        block = block.replace("\\\n", " ")
        # An array of words over several lines is one command.
        block = re.sub(r"\w+=\((.*?)\)", lambda found: found[1].replace("\n", " "), block, flags=re.DOTALL)
        for line in block.splitlines():
            for part in re.split(r"&&|\|\|", line.removeprefix("$ ").split(" #")[0]):
                yield shlex.split(part) if part.count('"') % 2 == 0 else []


def started(words: list[str]) -> tuple[Path, list[str]] | None:
    """The project's file that a command starts, and its arguments."""
    for number, word in enumerate(words):
        if word == "-m" and words[number + 1].startswith("nemo_lrpo."):
            return ROOT / (words[number + 1].replace(".", "/") + ".py"), words[number + 2 :]
        if re.fullmatch(r"(tools|slurm|tests)/[\w/]+\.(py|sh|sbatch)", word):
            return ROOT / word, words[number + 1 :]
    return None


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_name_files_and_options_that_are_there(guide: str) -> None:
    seen = 0
    for file, arguments in filter(None, map(started, commands(guide))):
        assert file.is_file(), f"{guide}: {file}"
        source = file.read_text(encoding="utf-8")
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        for option in (word.split("=")[0] for word in own if re.match(r"--[a-z]", word)):
            known = option in source or (option == "--config-name" and "hydra" in source)
            assert known, f"{guide}: {file.name} {option}"
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("guide", GUIDES[:2])
def test_keys_of_commands_are_those_of_the_configuration(guide: str) -> None:
    seen = 0
    for words in commands(guide):
        found = started(words)
        if found is None:
            continue
        file, arguments = found
        if file.name == "submit.py":
            rewards = [arguments[n + 1] for n, word in enumerate(arguments) if word == "--reward"]
            calls = [("serve_rewards", rewards), ("train", arguments[arguments.index("--") + 1 :])]
        else:
            calls = [(CONFIGS.get(file.stem, ""), arguments)]
        for config, overrides in calls:
            keys = [word for word in overrides if re.match(r"[+~]*[\w.]+=", word)]
            if "--config-name=evaluate" in overrides:
                config = "evaluate"
            if not config or not keys:
                continue
            try:
                compose(config, keys)
            except HydraException as error:
                raise AssertionError(f"{guide}: {shlex.join(words)}\n{error}") from error
            seen += 1
    assert seen > 2


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_are_named_are_there(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = re.findall(r"`((?:nemo_lrpo|tools|conf|slurm|tests)/[\w./-]*\w|Dockerfile|conf/recipes)`", text)
    assert named
    for name in named:
        assert (ROOT / name).exists() or name.startswith(ELSEWHERE), f"{guide}: {name}"
