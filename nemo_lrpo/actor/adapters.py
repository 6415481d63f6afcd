"""LoRA's adapters: as shards of a checkpoint, and merged into the weights that they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import sharded_state_dict_default
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from torch import Tensor

LAYER = "adapter_layer"
"""NeMo's container of a module's adapters."""
_GATED = "lora_hto4h_adapter"
_ADAPTED = {
    "lora_kqv_adapter": "linear_qkv",
    "lora_dense_attention_adapter": "linear_proj",
    _GATED: "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
}
"""NeMo's names of the adapters of variant `nemo` -> the module beside them that they adapt."""


def adapter_shards(container: torch.nn.ModuleDict, gated: bool) -> Any:
    """`sharded_state_dict` of a module's adapters: a function as Megatron calls it.

    NeMo's container has none, and Megatron would take its parts for the same on all tensor-parallel ranks. gated: the
    feed-forward layer's first matrix has two halves, each split over the ranks, and so has its adapter.
    """

    def shards(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, adapter in _named(container):
            of_adapter = sharded_state_dict_default(adapter, f"{prefix}{name}.", sharded_offsets, metadata)
            outer = f"{prefix}{name}.linear_out.weight"
            if gated and name == _GATED:
                of_adapter[outer] = apply_swiglu_sharded_factory(of_adapter[outer], sharded_offsets)
            found |= of_adapter
        return found

    return shards


def describe_shards(chunks: Iterable[torch.nn.Module]) -> None:
    """Give the adapters of a model's `chunks` the shards that `adapter_shards` says."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, LAYER):
            layer = getattr(module, LAYER)
            layer.sharded_state_dict = adapter_shards(layer, gated=bool(module.config.gated_linear_unit))


@contextmanager
def merged(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """All ranks: inside, the adapted weights are W + alpha / dim * out @ in; afterwards, bit by bit, those from before.

    They wait on the host meanwhile. The adapters stay on: nothing may go through the model inside.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for module in (module for chunk in chunks for module in chunk.modules()):
                for name, adapter in _named(getattr(module, LAYER, torch.nn.ModuleDict())):
                    weight = getattr(module, _ADAPTED[name]).weight
                    kept.append((weight, weight.to("cpu", copy=True)))
                    weight.copy_(weight.float().add_(_product(adapter)))
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def leave_sequence_parallelism(chunks: Iterable[torch.nn.Module]) -> list[Any]:
    """After NeMo has taken a model's `chunks` out of sequence parallelism: their adapters too; those that were in it.

    An adapter gathers its input or scatters its output where sequences are split (`_sequence_parallel`), which NeMo 2.2
    leaves as it is.
    """
    split = [adapter for adapter in _adapters(chunks) if adapter._sequence_parallel]
    for adapter in split:
        adapter._sequence_parallel = False
    return split


def resume_sequence_parallelism(chunks: Iterable[torch.nn.Module], split: Iterable[Any]) -> None:
    """After NeMo has put `chunks` back: `split` too. An adapter's own matrices see whole sequences, whatever the model
    does, and must not take part; NeMo 2.2 puts every layer back that could."""
    for adapter in split:
        adapter._sequence_parallel = True
    for adapter in _adapters(chunks):
        adapter.linear_in.sequence_parallel = adapter.linear_out.sequence_parallel = False


def _adapters(chunks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    for module in (module for chunk in chunks for module in chunk.modules()):
        for _, adapter in _named(getattr(module, LAYER, torch.nn.ModuleDict())):
            yield adapter


class AdapterShards:
    """Mix into a NeMo model class, before it: what a checkpoint, and what a .nemo, has of a model with adapters."""

    _merged = False

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """What a checkpoint holds of the model: with adapters these alone, the base being in its .nemo; merged, the
        rest. NeMo 2.2 says None here where there are adapters, and then saves nothing through Megatron."""
        whole = super(NLPAdapterModelMixin, self).sharded_state_dict(prefix)
        if not self.use_peft:
            return whole
        return {key: shard for key, shard in whole.items() if (f"{LAYER}." in key) != self._merged}

    @contextmanager
    def merged(self) -> Iterator[None]:
        """All ranks: inside, to be saved only, the model has its adapters in its weights, and is complete without."""
        with merged(self.get_model_module_list()):
            self._merged = True
            try:
                yield
            finally:
                self._merged = False


def _named(container: torch.nn.ModuleDict) -> Iterator[tuple[str, Any]]:
    """NeMo's names are members of an enumeration, which print and hash as something else."""
    for name, adapter in container.items():
        yield getattr(name, "value", name), adapter


def _product(adapter: Any) -> Tensor:
    """What an adapter adds to this rank's part of a weight, float32."""
    inner, outer = adapter.linear_in.weight.float(), adapter.linear_out.weight.float()
    # The adapted layer splits rows: the outer matrix does as well. It splits columns: so does the inner one. The other
    # matrix is split by its rows.
    if adapter.input_is_parallel:
        outer = _rows_of_all(outer)
    else:
        inner = _rows_of_all(inner)
    return (outer @ inner).mul_(adapter.alpha / adapter.dim)


def _rows_of_all(matrix: Tensor) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(matrix) for _ in range(group.size())]
    dist.all_gather(parts, matrix.contiguous(), group=group)
    return torch.cat(parts)
