"""The Dockerfile, the job script and the pins that they share with the rest of the project."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.container_requirements import PROTECTED, dependencies, missing, pins, protected

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PINS = pins((ROOT / "tools" / "requirements-cpu.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("linter", "arguments"),
    [
        ("hadolint", ["Dockerfile"]),
        ("shellcheck", ["slurm/train.sbatch", "tools/setup.sh", "tools/test.sh", ".ci/run"]),
    ],
)
def test_linted(linter: str, arguments: list[str]) -> None:
    beside = Path(sys.executable).with_name(linter)
    program = str(beside) if beside.exists() else shutil.which(linter)
    if program is None:
        pytest.skip(f"{linter} is not installed; tools/setup.sh installs it on x86-64")
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_dependencies_come_first() -> None:
    copied = [source for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    # A change of the code must not install the dependencies anew.
    before = DOCKERFILE[: DOCKERFILE.index("container_requirements.py --protected")]
    assert "COPY pyproject.toml" in before and "COPY nemo_lrpo" not in before and "COPY tools tools" not in before


def test_nothing_is_installed_but_what_is_pinned() -> None:
    installs = re.findall(r"pip install [^;&\n]*", DOCKERFILE)
    assert len(installs) == 2 and all("--no-deps" in install for install in installs)


def test_labels_agree_with_pyproject() -> None:
    versions = dict(re.findall(r'"(nemo-toolkit|megatron-core|nemo-aligner)==([^"]+)"', PYPROJECT))
    labels = dict(re.findall(r'nemo_lrpo\.([a-z-]+)="([^"]+)"', DOCKERFILE))
    assert labels["nemo-aligner"] == versions["nemo-aligner"]
    assert versions["nemo-toolkit"].startswith(labels["nemo"] + ".")
    assert versions["megatron-core"].startswith(labels["megatron-core"] + ".")
    (version,) = re.findall(r'^version = "([^"]+)"', PYPROJECT, re.MULTILINE)
    assert f"ARG VERSION={version}\n" in DOCKERFILE


def test_every_dependency_is_pinned_in_a_version_that_fits() -> None:
    wanted = dependencies(PYPROJECT)
    assert {"fasttext==0.9.3", "nemo-aligner==0.7.0"} <= set(wanted) and len(wanted) > 15
    for requirement in map(Requirement, wanted):
        name, version = PINS[re.sub("[-_.]+", "-", requirement.name).lower()].split("==")
        assert requirement.specifier.contains(version), name


def test_nothing_is_missing_where_the_lock_is_installed() -> None:
    assert missing(dependencies(PYPROJECT), PINS) == []


def test_what_is_missing_or_does_not_fit_is_named_with_its_pin_and_what_the_container_is_for_never() -> None:
    there = {"httpx": "0.26.0", "nemo-aligner": "0.6.0", "math-verify": "0.9.0", "tenacity": "8.5.0", "torch": "2.6.0"}
    asks = {"math-verify": ["latex2sympy2_extended==1.11.0", "torch>=9", 'nothing; extra == "antlr"'], "tenacity": []}

    def version_of(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    wanted = ["httpx>=0.27,<1", "numpy>=1.26", "math-verify==0.9.0", "tenacity>=8.3", "nemo-aligner==0.7.0"]
    named = missing(wanted, PINS, version_of, asks.get)
    assert named == [PINS["httpx"], PINS["latex2sympy2-extended"], PINS["nemo-aligner"]]
    with pytest.raises(KeyError, match="surely-not-there is needed and not pinned"):
        missing(["surely-not-there"], PINS, version_of, asks.get)


def test_what_is_protected() -> None:
    here = {line.split("==")[0] for line in protected()}
    assert {"torch", "numpy", "nemo-toolkit", "megatron-core", "transformers"} <= here
    for name in ("transformer-engine-torch", "apex", "tensorrt-llm", "tensorrt", "nvidia-cublas-cu12"):
        assert PROTECTED.fullmatch(name)
    for name in ("nvidia-pytriton", "nemo-aligner", "fasttext", "httpx"):
        assert not PROTECTED.fullmatch(name)
