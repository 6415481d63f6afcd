"""The rooms of the house: who imports whom, and what an import may weigh."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemo_lrpo"
SHARED = {"types", "seeding"}
ROOMS = {
    "config": set(),
    "data": {"config"},
    "planning": {"config"},
    "router": {"config"},
    "rewards": {"config", "explang"},
    "serving": {"config"},
    "algorithms": set(),
    "actor": {"config", "algorithms", "cpu"},
    "tasks": {"config", "data"},
    "training": {"config", "data", "router", "algorithms", "tasks", "explang"},
    "cpu": set(),
    "checkup": set(),
    "explang": {"config", "data"},
}
"""Rooms that a room may import, besides itself and the shared modules."""
ENTRY_POINTS = {"train", "train_offline", "train_sft", "evaluate", "serve_rewards", "rank", "preflight"}
STACK = {"megatron", "nemo", "nemo_aligner", "apex", "transformer_engine", "tensorrt_llm"}
STACK_ROOMS = {"actor", "cpu"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in it; under TYPE_CHECKING does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    allowed = ROOMS[room] | SHARED | {room}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for name in imports(path):
            if name.startswith("nemo_lrpo."):
                assert room_of(name) in allowed, f"{path.relative_to(ROOT)} imports {name}"
            if room not in STACK_ROOMS:
                assert name.split(".")[0] not in STACK, f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_and_module_is_a_room_an_entry_point_or_shared() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__pycache__"} == set(ROOMS) | SHARED | ENTRY_POINTS


def test_only_entry_points_put_rooms_together() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in imports(path):
            if name.startswith("nemo_lrpo.") and room_of(name) in ENTRY_POINTS:
                assert path.stem in ENTRY_POINTS, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "nemo_lrpo.types",
        "nemo_lrpo.config.loader",
        "nemo_lrpo.router",
        "nemo_lrpo.serving.schema",
        "nemo_lrpo.train",
        "nemo_lrpo.train_offline",
        "nemo_lrpo.preflight",
    ],
)
def test_light_modules_import_without_torch(module: str) -> None:
    heavy = "{'torch', 'nemo', 'megatron', 'transformers'} & set(sys.modules)"
    code = f"import sys, {module}; print({heavy}); assert not {heavy}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_speaks_of_a_machine() -> None:
    """No absolute home paths or registry hosts in what is tracked."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = ["/" + "root/", "/" + "home/", "/" + "work/", "pypi." + "org", "hugging" + "face.co"]
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".sh", ".yaml", ".md", ".toml", ".txt"} and path.exists():
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], name
