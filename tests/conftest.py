"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from warm_start import Starter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run, so that a run tells about the change and not about the draw. New ones are looked for
# with `--hypothesis-profile explore`.
# A busy machine is no failure: tests of time say so themselves.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that two processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama as a .nemo."""
    from tiny_model import build_nemo

    return build_nemo(tmp_path_factory.mktemp("tiny") / "tiny.nemo")


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """Starts of entry points from a process that has the stack imported."""
    starter = Starter()
    yield starter
    starter.close()
