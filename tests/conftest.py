"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama as a .nemo."""
    from tiny_model import build_nemo

    return build_nemo(tmp_path_factory.mktemp("tiny") / "tiny.nemo")
