"""Megatron-Core's distributed checkpoint (its torch_dist format), written and read a tensor at a time.

The format is that of torch.distributed.checkpoint: a pickled table `.metadata` of tensors and their chunks, and files
that hold the chunks, each as torch.save writes it. Megatron-Core keeps tensors of all layers as one, with the layer as
the leading axis, and adds metadata.json (the format) and common.pt (what is not a tensor; empty here). Writing and
reading go through torch's own planners and storage, so neither Megatron nor a process group is needed, and a chunk is
in memory only while it is written or read.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tools.conversion.archive import NemoArchive
from tools.conversion.errors import ConversionError
from tools.conversion.mapping import PREFIX, Entry

DIRECTORY = "model_weights"
"""Of a .nemo."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CHUNKS = 8
"""Pieces of a large tensor along the axis that tensor parallelism splits: a rank reads whole chunks."""
_LARGE = 2**20
"""Elements from which it is worth it."""


def write_shards(
    entries: Sequence[Entry],
    read: Callable[[Entry], torch.Tensor],
    extra_states: Sequence[str],
    layers: int,
    dtype: torch.dtype,
    directory: Path,
) -> None:
    """Write a distributed checkpoint into `directory`.

    read: Megatron's tensor of an entry, called once for each, in order. extra_states: keys of modules with a state to
    be left empty, for each of `layers`. dtype: of the stored tensors.
    """
    directory.mkdir()
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
    torch.save({}, directory / "common.pt")
    with warnings.catch_warnings():
        # One process is what is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(
            {},
            # One after another: none may be resolved before the one before it is written.
            storage_writer=_Writer(directory, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0),
            planner=_Streaming(entries, read, extra_states, layers, dtype),
            no_dist=True,
        )


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: torch would note the scratch directory's path."""


class _Streaming(SavePlanner):
    """Hands each chunk over when it is to be written."""

    def __init__(
        self,
        entries: Sequence[Entry],
        read: Callable[[Entry], torch.Tensor],
        extra_states: Sequence[str],
        layers: int,
        dtype: torch.dtype,
    ):
        self._read, self._layers, self._dtype = read, layers, dtype
        self._entries = {(PREFIX + entry.key, entry.layer): entry for entry in entries}
        self._extra_states = extra_states
        self._current: tuple[Entry, torch.Tensor] | None = None
        self._handed_over: torch.Tensor | None = None

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [item for entry in self._entries.values() for item in self._items(entry)]
        for key in self._extra_states:
            for layer in range(self._layers):
                index = MetadataIndex(f"{PREFIX}{key}/shard_{layer}_{self._layers}")
                items.append(WriteItem(index, WriteItemType.BYTE_IO))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        if self._handed_over is not None:
            # torch holds on to the last chunk of every key until all are written; this one is.
            self._handed_over.untyped_storage().resize_(0)
        assert write_item.tensor_data is not None
        chunk, tensor = write_item.tensor_data.chunk, self._tensor(write_item.index)
        offsets, sizes = chunk.offsets[-tensor.ndim :], chunk.sizes[-tensor.ndim :]
        piece = tensor[tuple(slice(start, start + size) for start, size in zip(offsets, sizes))]
        # A copy: torch.save would write all of the storage that a view lies in.
        piece = piece.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        self._handed_over = piece.view(chunk.sizes)
        return self._handed_over

    def _tensor(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        entry = self._entries.get((index.fqn, None)) or self._entries[index.fqn, int(index.offset[0])]
        if self._current is None or self._current[0] is not entry:
            self._current = None  # the old one goes before the new one comes
            self._current = entry, self._read(entry)
        return self._current[1]

    def _items(self, entry: Entry) -> list[WriteItem]:
        leading = () if entry.layer is None else (entry.layer,)
        size = (self._layers,) * len(leading) + entry.shape
        properties = TensorProperties(dtype=self._dtype)
        items = []
        for offsets, sizes in _chunks(entry):
            chunk = ChunkStorageMetadata(torch.Size((*leading, *offsets)), torch.Size(((1,) * len(leading)) + sizes))
            index = MetadataIndex(PREFIX + entry.key, chunk.offsets)
            data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items


def _chunks(entry: Entry) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the pieces of an entry's tensor."""
    whole = (0,) * len(entry.shape)
    pieces = _CHUNKS * entry.sections
    axis = entry.axis
    if axis is None or torch.Size(entry.shape).numel() < _LARGE or entry.shape[axis] % pieces:
        return [(whole, entry.shape)]
    step = entry.shape[axis] // pieces
    sizes = tuple(step if dim == axis else length for dim, length in enumerate(entry.shape))
    return [(tuple(step * piece if dim == axis else 0 for dim in range(len(sizes))), sizes) for piece in range(pieces)]


class ShardReader:
    """Tensors of the distributed checkpoint inside a .nemo, a layer at a time.

    Works at whatever parallel sizes it was saved. Raises ConversionError for a .nemo without one, one in another
    format, or a table that names anything but tensors.
    """

    def __init__(self, archive: NemoArchive):
        name = f"{DIRECTORY}/metadata.json"
        if name not in archive:
            raise ConversionError(f"{archive.path}: no {name}; accepted: a .nemo with a distributed checkpoint.")
        with archive.open(name) as file:
            backend = json.load(file).get("sharded_backend")
        if backend != _FORMAT["sharded_backend"]:
            raise ConversionError(
                f"{archive.path}: its weights are in the format {backend!r}; accepted: {_FORMAT['sharded_backend']!r} "
                "(load it with NeMo and save it again with model.dist_ckpt_format=torch_dist)."
            )
        self._path = archive.path
        self._storage = _Reader(archive)
        self._metadata = self._storage.read_metadata()
        self._storage.set_up_storage_reader(self._metadata, True)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor `key`, layers included."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Of the tensor `key` as it is stored."""
        return self._tensor(key).properties.dtype

    def check(self, entry: Entry) -> None:
        """Raise ConversionError unless the checkpoint has the tensor of `entry`."""
        stored = tuple(self._tensor(entry.key).size)
        shape = stored if entry.layer is None else stored[1:]
        if shape != entry.shape:
            raise ConversionError(f"{self._path}: {entry.key} has shape {shape}, not {entry.shape}.")
        if entry.layer is not None and entry.layer >= stored[0]:
            raise ConversionError(f"{self._path}: {entry.key} has {stored[0]} layers, not {entry.layer + 1} or more.")

    def read(self, entry: Entry) -> torch.Tensor:
        """Megatron's tensor of `entry`."""
        stored = self._tensor(entry.key)
        leading = () if entry.layer is None else (entry.layer,)
        target = torch.empty((1,) * len(leading) + entry.shape, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size((*leading, *(0 for _ in entry.shape))), target.size())
        items = create_read_items_for_chunk_list(PREFIX + entry.key, stored, [wanted])
        self._storage.read_data(LoadPlan(items), _Into(target)).wait()
        return target[0] if leading else target

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata.get(PREFIX + key)
        if not isinstance(found, TensorStorageMetadata):
            raise ConversionError(f"{self._path}: the weights lack {PREFIX + key}.")
        return found


class _Into(LoadPlanner):
    """Reads chunks into one tensor."""

    def __init__(self, target: torch.Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = (slice(start, start + length) for start, length in zip(read_item.dest_offsets, read_item.lengths))
        return self._target[tuple(place)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    # Collective parts of a load, which this is not.
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]


class _Reader(dcp.FileSystemReader):
    """torch's reader over the files of an archive, its table unpickled with nothing but torch's own names."""

    def __init__(self, archive: NemoArchive):
        super().__init__(DIRECTORY)
        self.fs = _ArchiveFiles(archive)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(f"{DIRECTORY}/.metadata", "rb") as stream:
            return _TableUnpickler(stream).load()


class _ArchiveFiles(filesystem.FileSystem):
    def __init__(self, archive: NemoArchive):
        self._archive = archive

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Any:
        with self._archive.open(str(path)) as stream:
            yield stream


class _TableUnpickler(pickle.Unpickler):
    """A pickle may call any function it names; this one may name what such a table is made of."""

    _MODULES: ClassVar = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    _NAMES: ClassVar = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("io", "BytesIO"),
    }
    _ENUMS: ClassVar = {"WriteItemType", "LoadItemType", "_MEM_FORMAT_ENCODING"}

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format)
        if (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        if module.startswith(self._MODULES[1]):
            # Megatron-Core leaves its own plans in the table, which nobody reads again.
            return _Ignored
        if module.startswith(self._MODULES[0]):
            found = super().find_class(module, name)
            if isinstance(found, type) and (hasattr(found, "__dataclass_fields__") or name in self._ENUMS):
                return found
        raise ConversionError(f"{DIRECTORY}/.metadata names {module}.{name}, which has no place in it.")


class _Ignored:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass
