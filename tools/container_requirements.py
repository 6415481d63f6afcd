"""What a container lacks of the project's dependencies, as pins for pip.

    python tools/container_requirements.py > missing.txt && pip install --no-deps -r missing.txt

For every dependency in pyproject.toml, and what the installed ones depend on in turn: nothing where a version that fits
is installed, else the pin of tools/requirements-cpu.txt. What the container is chosen for (torch, Transformer Engine,
Apex, TensorRT-LLM, NeMo, Megatron-Core and CUDA's packages) is never named. Needs a second run once its pins are
installed, for their own dependencies. With --protected: the versions of what is never named, to compare before and
after.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROTECTED = re.compile(
    r"(torch|torchvision|torchaudio|triton|transformer-engine.*|apex|flash-attn.*|tensorrt.*|nemo-toolkit|megatron-core|"
    r"nvidia-(?!pytriton).*|cuda-.*|cupy.*|numpy|lightning|pytorch-lightning|transformers|protobuf)"
)
ALIGNER = "nemo-aligner"
"""Pure Python: where the container has another release, it is replaced by the one that is supported."""

VersionOf = Callable[[str], str]


def dependencies(pyproject: str) -> list[str]:
    """`project.dependencies` of a pyproject.toml, and the pin of NeMo-Aligner. Python 3.10 has no reader for TOML."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    aligner = re.search(rf'"({ALIGNER}==[^"]+)"', pyproject)
    if block is None or aligner is None:
        raise ValueError("pyproject.toml has no dependencies, or no pin of nemo-aligner")
    return [*re.findall(r'^\s*"([^"]+)"', block.group(1), re.MULTILINE), aligner.group(1)]


def pins(lock: str) -> dict[str, str]:
    """Canonical name -> `name==version` of a requirements file."""
    lines = [re.split("[#;]", line)[0].strip() for line in lock.splitlines()]
    return {canonicalize_name(line.split("==")[0]): line for line in lines if "==" in line}


def missing(
    wanted: Iterable[str],
    pinned: Mapping[str, str],
    version_of: VersionOf = metadata.version,
    requires: Callable[[str], list[str] | None] = metadata.requires,
) -> list[str]:
    """Pins of what is not installed, or not in a version that fits, of `wanted` and all that depends on it.

    What installed packages themselves ask for counts as there in whatever version: the container was built with it.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    queue = [(Requirement(text), True) for text in wanted]
    while queue:
        requirement, ours = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if name in seen or PROTECTED.fullmatch(name) or not _applies(requirement):
            continue
        seen.add(name)
        try:
            fits = requirement.specifier.contains(version_of(name), prereleases=True) or not ours
        except metadata.PackageNotFoundError:
            fits = False
        if not fits:
            if name not in pinned:
                raise KeyError(f"{name} is needed and not pinned in tools/requirements-cpu.txt")
            found[name] = pinned[name]
        elif ours or name in pinned:
            queue += [(Requirement(text), False) for text in requires(name) or []]
    return sorted(found.values(), key=str.lower)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def protected() -> list[str]:
    """name==version of all that is installed and never named."""
    names = {canonicalize_name(d.metadata["Name"] or ""): d.version for d in metadata.distributions()}
    return sorted(f"{name}=={version}" for name, version in names.items() if PROTECTED.fullmatch(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protected", action="store_true", help="print the versions of what is left alone instead")
    if parser.parse_args().protected:
        print("\n".join(protected()))
        return
    wanted = dependencies((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = pins((ROOT / "tools" / "requirements-cpu.txt").read_text(encoding="utf-8"))
    sys.stdout.write("".join(f"{pin}\n" for pin in missing(wanted, pinned)))


if __name__ == "__main__":
    main()
