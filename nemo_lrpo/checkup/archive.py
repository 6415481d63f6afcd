"""What a .nemo says of its weights, without loading them and without running anything that it brought."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

EMBEDDING = "embedding.word_embeddings.weight"


class _Inert:
    """Stands for every class that a pickle names: it keeps what it is given and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.state = arguments, named

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"": state}


class _Reader(pickle.Unpickler):
    """Builds inert objects only, so that a pickle can do no harm."""

    def find_class(self, module: str, name: str) -> type[_Inert]:
        return _Inert


def embedding_rows(nemo: Path) -> int | None:
    """Rows of the word embedding in the .nemo's distributed checkpoint, padding included; None where it does not say.

    Reads the checkpoint's index: Zarr's JSON, or PyTorch's pickle, whose classes are replaced by inert ones.
    """
    for name, read in _index_files(nemo):
        if name.endswith(f"{EMBEDDING}/.zarray"):
            return int(json.loads(read())["shape"][0])
        if name.endswith("model_weights/.metadata"):
            return _rows_of_index(read())
    return None


def _rows_of_index(data: bytes) -> int | None:
    try:
        index = _Reader(io.BytesIO(data)).load()
        tensors = index.state["state_dict_metadata"]
        entry = next(value for key, value in tensors.items() if str(key).endswith(EMBEDDING))
        (size,) = entry.state["size"].arguments
        return int(size[0])
    except (pickle.UnpicklingError, AttributeError, KeyError, StopIteration, TypeError, ValueError, IndexError):
        return None


def _index_files(nemo: Path) -> list[tuple[str, Any]]:
    """Names of the small files of a .nemo, packed or extracted, each with a function that reads it."""
    if nemo.is_dir():
        return [(str(path), path.read_bytes) for path in sorted(nemo.rglob(".*")) if path.is_file()]
    with tarfile.open(nemo) as archive:
        found = []
        for member in archive:
            if member.isfile() and Path(member.name).name.startswith("."):
                data = archive.extractfile(member)
                content = data.read() if data is not None else b""
                found.append((member.name, lambda content=content: content))
        return found
