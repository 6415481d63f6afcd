"""Which Hugging Face tensors make up which of Megatron's, and how they are put together and taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from nemo_lrpo.planning.shapes import ModelShape

PREFIX = "model."
"""Before every key of a checkpoint that NeMo writes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of Megatron's, or one layer of it, and the Hugging Face tensors that it is made of.

    key: Megatron's, without PREFIX. layer: its place along the leading layer axis, None outside the layers. names and
    parts: the Hugging Face tensors and their shapes. shape: Megatron's, without the layer axis. axis: the one that
    tensor parallelism splits, None for none.
    """

    key: str
    names: tuple[str, ...]
    parts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    layer: int | None = None
    axis: int | None = None
    sections: ClassVar[int] = 1
    """Tensor parallelism splits each of so many equal parts of the axis for itself."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Megatron's tensor from Hugging Face's."""
        return tensors[0]

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Hugging Face's tensors from Megatron's."""
        return (tensor,)


@dataclass(frozen=True)
class QkvEntry(Entry):
    """Attention's three projections as one: for each of `groups` its queries' rows, then its key's, its value's."""

    groups: int = 1

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        rows = [part[0] // self.groups for part in self.parts]
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1)]


@dataclass(frozen=True)
class GatedEntry(Entry):
    """Gate above up; each rank's share is a slice of both."""

    sections: ClassVar[int] = 2

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return tensor.chunk(2)


@dataclass(frozen=True)
class VocabularyEntry(Entry):
    """Rows of zeros are added up to the padded vocabulary, and taken away on the way out."""

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        table = tensors[0][: self.shape[0]]
        missing = self.shape[0] - table.size(0)
        return torch.nn.functional.pad(table, (0, 0, 0, missing)) if missing else table

    def split(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        return (tensor[: self.parts[0][0]],)


def entries(shape: ModelShape, padded: int) -> Iterator[Entry]:
    """Every tensor of the model, one layer after another. `padded`: rows of Megatron's vocabulary."""
    hidden = shape.hidden
    table = ((shape.vocabulary, hidden),)
    yield VocabularyEntry(
        "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), table, (padded, hidden), axis=0
    )
    for layer in range(shape.layers):
        yield from _layer(shape, layer)
    yield _plain("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not shape.tied:
        yield VocabularyEntry("output_layer.weight", ("lm_head.weight",), table, (padded, hidden), axis=0)


def extra_states(shape: ModelShape) -> tuple[str, ...]:
    """Keys of the modules whose (empty) fp8 state Transformer Engine demands from a checkpoint, for every layer."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    if not shape.gemma2:
        modules.append("self_attention.core_attention")
    if shape.gemma2:
        modules += ["self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"]
    return tuple(f"decoder.layers.{module}._extra_state" for module in modules)


def _layer(shape: ModelShape, layer: int) -> Iterator[Entry]:
    hidden, ffn, queries, keys = shape.hidden, shape.ffn, shape.query_width, shape.key_width
    source, target = f"model.layers.{layer}", "decoder.layers"
    attention, mlp = f"{target}.self_attention", f"{target}.mlp"
    projections = tuple(f"{source}.self_attn.{name}_proj" for name in "qkv")
    # Gemma 2 calls the norm before the feed-forward layer what the others call it, and puts one after attention.
    before_mlp = "pre_feedforward_layernorm" if shape.gemma2 else "post_attention_layernorm"

    yield _plain(f"{attention}.linear_qkv.layer_norm_weight", f"{source}.input_layernorm.weight", (hidden,), layer)
    for suffix, columns in (("weight", (hidden,)), ("bias", ())):
        if suffix == "weight" or shape.qkv_bias:
            yield QkvEntry(
                f"{attention}.linear_qkv.{suffix}",
                tuple(f"{name}.{suffix}" for name in projections),
                tuple((rows, *columns) for rows in (queries, keys, keys)),
                (queries + 2 * keys, *columns),
                layer,
                axis=0,
                groups=shape.groups,
            )
    yield _plain(
        f"{attention}.linear_proj.weight", f"{source}.self_attn.o_proj.weight", (hidden, queries), layer, axis=1
    )
    yield _plain(f"{mlp}.linear_fc1.layer_norm_weight", f"{source}.{before_mlp}.weight", (hidden,), layer)
    yield GatedEntry(
        f"{mlp}.linear_fc1.weight",
        (f"{source}.mlp.gate_proj.weight", f"{source}.mlp.up_proj.weight"),
        ((ffn, hidden), (ffn, hidden)),
        (2 * ffn, hidden),
        layer,
        axis=0,
    )
    yield _plain(f"{mlp}.linear_fc2.weight", f"{source}.mlp.down_proj.weight", (hidden, ffn), layer, axis=1)
    if shape.gemma2:
        for key, name in (
            (f"{attention}.linear_proj", "post_attention_layernorm"),
            (f"{mlp}.linear_fc2", "post_feedforward_layernorm"),
        ):
            yield _plain(f"{key}.post_layernorm.weight", f"{source}.{name}.weight", (hidden,), layer)


def _plain(key: str, name: str, shape: tuple[int, ...], layer: int | None = None, axis: int | None = None) -> Entry:
    return Entry(key, (name,), (shape,), shape, layer, axis)
