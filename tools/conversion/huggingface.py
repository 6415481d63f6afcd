"""Directories of safetensors files, read and written a tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tools.conversion.errors import ConversionError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HfWeights:
    """Tensors of a safetensors checkpoint by name, in one file or many.

    A file is open only while a tensor of it is read: pages of an open one count as this process's memory. Raises
    ConversionError for files that are missing or not safetensors.
    """

    def __init__(self, source: Path):
        index, single = source / _INDEX, source / _SINGLE
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif single.is_file():
            files = [single.name]
        else:
            raise ConversionError(
                f"{source}: neither {single.name} nor {index.name}; save the model with safe_serialization=True."
            )
        self._source = source
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            if not (source / name).is_file():
                raise ConversionError(f"{source / name}: no such file, though {index.name} lists it.")
            try:
                with safe_open(str(source / name), framework="pt") as handle:
                    self._files |= dict.fromkeys(handle.keys(), source / name)
                    self._shapes |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
            except SafetensorError as error:
                raise ConversionError(f"{source / name}: not a safetensors file ({error}).") from error

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ConversionError unless there is a tensor `name` of that shape."""
        if name not in self._files:
            raise ConversionError(f"{self._source}: the weights lack {name}.")
        if self._shapes[name] != shape:
            raise ConversionError(f"{self._source}: {name} has shape {self._shapes[name]}, not {shape}.")

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`."""
        with safe_open(str(self._files[name]), framework="pt") as handle:
            return handle.get_tensor(name)


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    plans: Iterable[TensorPlan], tensors: Iterable[torch.Tensor], directory: Path, max_shard: int
) -> None:
    """Write `tensors`, in the order of `plans`, as safetensors files of at most `max_shard` bytes each.

    Nothing is held but the tensor that is being written, which is why the files are laid out here (a length of eight
    bytes, a JSON header, the tensors end to end) and not by safetensors' own writer, which wants all of a file at
    once. A tensor larger than max_shard has a file of its own; an index is written where there are several files.
    """
    shards = _shards(plans, max_shard)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, stream)
        weight_map |= dict.fromkeys((plan.name for plan in shard), name)
    if len(shards) > 1:
        total = sum(plan.size for shard in shards for plan in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(plans: Iterable[TensorPlan], max_shard: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    used = 0
    for plan in plans:
        if shards[-1] and used + plan.size > max_shard:
            shards.append([])
            used = 0
        shards[-1].append(plan)
        used += plan.size
    return shards


def _write_file(path: Path, plans: list[TensorPlan], tensors: Iterator[torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.size
        header[plan.name] = {"dtype": _DTYPES[plan.dtype], "shape": plan.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for plan in plans:
            tensor = next(tensors)
            assert tuple(tensor.shape) == plan.shape and tensor.dtype == plan.dtype, plan
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
