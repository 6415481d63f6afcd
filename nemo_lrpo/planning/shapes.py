"""The sizes of a model that its weights, memory and time depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_lrpo.config.checks import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM")
"""Hugging Face's names of what can be converted and planned."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder with rotary positions, gated feed-forward layers and RMS norms."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    """Key-value heads; fewer than `heads` is grouped-query attention."""
    head_dim: int
    vocabulary: int
    """Rows of the embedding."""
    tied: bool = False
    """The output layer is the embedding."""
    qkv_bias: bool = False
    gemma2: bool = False
    """Gemma 2's layers as NeMo has them: norms after attention and feed-forward layer too, a GELU of plain operations,
    and capped attention scores, which rule flash attention out."""

    scaled_rope: bool = False
    """Rotations are stretched at low frequencies for long contexts (Llama 3.1 and later)."""

    @property
    def query_width(self) -> int:
        """Columns of all heads together."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Columns of all key heads together; values have as many."""
        return self.groups * self.head_dim


def from_huggingface(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config.json describes.

    Raises ConfigError for an architecture that is not supported, keys that are missing or heads that do not divide.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture {architecture!r} is not supported; accepted: {', '.join(ARCHITECTURES)}.")
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    absent = [key for key in required if key not in config]
    if absent:
        raise ConfigError(f"keys missing: {', '.join(absent)}.")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    gemma = architecture == "Gemma2ForCausalLM"
    return _checked(
        ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            groups=int(config.get("num_key_value_heads") or heads),
            # save_pretrained leaves a key out where it is the class's default.
            head_dim=int(config.get("head_dim") or (256 if gemma else hidden // heads)),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", gemma)),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            gemma2=gemma,
            scaled_rope=bool(config.get("rope_scaling")),
        )
    )


def from_nemo(config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
    """The shape that the model section of a .nemo describes.

    vocabulary: rows of the embedding, where the section does not say what the converted model had. Raises ConfigError
    where neither is known, or heads do not divide.
    """
    if vocabulary is None:
        original = (config.get("huggingface") or {}).get("config") or {}
        if "vocab_size" not in original:
            raise ConfigError("the .nemo does not say how many rows its vocabulary has; give the number.")
        vocabulary = int(original["vocab_size"])
    gemma = config.get("name") == "megatron_gemma2"
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return _checked(
        ModelShape(
            layers=int(config["num_layers"]),
            hidden=hidden,
            ffn=int(config["ffn_hidden_size"]),
            heads=heads,
            groups=int(config.get("num_query_groups") or heads),
            head_dim=int(config.get("kv_channels") or hidden // heads),
            vocabulary=vocabulary,
            tied=bool(config.get("share_embeddings_and_output_weights", True)),
            qkv_bias=bool(config.get("qkv_bias", False)),
            gemma2=gemma,
            scaled_rope=bool(config.get("scale_positional_embedding")),
        )
    )


def _checked(shape: ModelShape) -> ModelShape:
    if shape.heads % shape.groups:
        raise ConfigError(f"{shape.groups} key-value heads do not divide {shape.heads} heads.")
    return shape


def _qwen(layers: int, hidden: int, ffn: int, heads: int, groups: int, rows: int, tied: bool = False) -> ModelShape:
    return ModelShape(layers, hidden, ffn, heads, groups, hidden // heads, rows, tied, qkv_bias=True)


def _llama2(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> ModelShape:
    return ModelShape(layers, hidden, ffn, heads, groups, hidden // heads, 32_000)


def _llama3(layers: int, hidden: int, ffn: int, heads: int, groups: int, tied: bool = False) -> ModelShape:
    return ModelShape(layers, hidden, ffn, heads, groups, hidden // heads, 128_256, tied, scaled_rope=True)


def _gemma(layers: int, hidden: int, ffn: int, heads: int, groups: int, head_dim: int) -> ModelShape:
    return ModelShape(layers, hidden, ffn, heads, groups, head_dim, 256_000, True, gemma2=True)


CATALOGUE: dict[str, ModelShape] = {
    "qwen2.5-0.5b": _qwen(24, 896, 4864, 14, 2, 151_936, tied=True),
    "qwen2.5-1.5b": _qwen(28, 1536, 8960, 12, 2, 151_936, tied=True),
    "qwen2.5-3b": _qwen(36, 2048, 11_008, 16, 2, 151_936, tied=True),
    "qwen2.5-7b": _qwen(28, 3584, 18_944, 28, 4, 152_064),
    "qwen2.5-14b": _qwen(48, 5120, 13_824, 40, 8, 152_064),
    "qwen2.5-32b": _qwen(64, 5120, 27_648, 40, 8, 152_064),
    "qwen2.5-72b": _qwen(80, 8192, 29_568, 64, 8, 152_064),
    "llama2-7b": _llama2(32, 4096, 11_008, 32, 32),
    "llama2-13b": _llama2(40, 5120, 13_824, 40, 40),
    "llama2-70b": _llama2(80, 8192, 28_672, 64, 8),
    "llama3.1-8b": _llama3(32, 4096, 14_336, 32, 8),
    "llama3.1-70b": _llama3(80, 8192, 28_672, 64, 8),
    "llama3.2-1b": _llama3(16, 2048, 8192, 32, 8, tied=True),
    "llama3.2-3b": _llama3(28, 3072, 8192, 24, 8, tied=True),
    "gemma2-2b": _gemma(26, 2304, 9216, 8, 4, 256),
    "gemma2-9b": _gemma(42, 3584, 14_336, 16, 8, 256),
    "gemma2-27b": _gemma(46, 4608, 36_864, 32, 16, 128),
}
"""Shapes of published models, from the config.json beside their weights."""
