"""A .nemo: an uncompressed tar, or the same files as a directory."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from tools.conversion.errors import ConversionError


class NemoArchive:
    """Files of a .nemo by name, read where they lie: a packed one is not unpacked."""

    def __init__(self, path: Path):
        self._path = path
        self._tar: tarfile.TarFile | None = None
        if path.is_dir():
            self._names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
            return
        try:
            self._tar = tarfile.open(path, "r:")
        except tarfile.ReadError as error:
            raise ConversionError(
                f"{path}: not an uncompressed tar ({error}); unpack it and give the directory."
            ) from error
        except OSError as error:
            raise ConversionError(f"{path}: {error.strerror or error}.") from error
        self._members = {os.path.normpath(member.name): member for member in self._tar if member.isfile()}
        self._names = set(self._members)

    def __enter__(self) -> NemoArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    @property
    def path(self) -> Path:
        return self._path

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def open(self, name: str) -> IO[bytes]:
        """The file `name`, seekable. Raises ConversionError where there is none."""
        if name not in self._names:
            raise ConversionError(f"{self._path}: {name} is not in it.")
        if self._tar is None:
            return (self._path / name).open("rb")
        stream = self._tar.extractfile(self._members[name])
        assert stream is not None
        return stream


def check_target(target: Path) -> None:
    """Refuse an output that would take the place of other files; a .nemo file is replaced."""
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target}: the directory exists and is not empty; remove it or give another name.")
    if target.is_file() and target.suffix != ".nemo":
        raise ConversionError(f"{target}: is a file; give another name.")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` when the block ends well; nothing of it is left otherwise."""
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        yield content
        os.replace(content, target)


@contextmanager
def new_archive(target: Path) -> Iterator[Path]:
    """The same for a .nemo: a name that ends in .nemo is packed, which for a moment takes the space twice."""
    if target.suffix != ".nemo":
        with new_directory(target) as content:
            yield content
        return
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        yield content
        packed = Path(scratch) / "archive.nemo"
        with tarfile.open(packed, "w:") as tar:
            tar.add(content, arcname=".")
        os.replace(packed, target)
