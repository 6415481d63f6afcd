"""NeMo's LoRA on Megatron-Core's layers, where Transformer Engine is not installed.

NeMo's classes need one name of Transformer Engine, a fused split that may be None; without the name their module cannot
be imported, and NeMo takes it that there are no adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from typing import Any

from nemo_lrpo.cpu.replacement import TRANSFORMER_ENGINE, Replacement, import_over

_PARTS = "nemo.collections.nlp.parts"
_ADAPTERS = "nemo.collections.nlp.modules.common.megatron.adapters"
_MODULE = f"{_ADAPTERS}.mcore_mixins"
_NAMES = (
    "MCoreGPTEmbeddingMixin",
    "MCoreMLPMixin",
    "MCoreSelfAttentionMixin",
    "MCoreSequentialMLPMixin",
    "MCoreTransformerBlockMixin",
    "MCoreTransformerLayerMixin",
)


def _from_mixins(name: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        return getattr(import_over(_MODULE, TRANSFORMER_ENGINE, SplitAlongDim=None), name)

    return make


def _as_before_transformer_engine(original: Any) -> Any:
    """An adapter asks for the version where sequences are parallel: from 1.5 on, its input comes gathered."""

    @functools.wraps(original)
    def construct(self: Any, *arguments: Any, **named: Any) -> None:
        version = metadata.version
        metadata.version = lambda name: "0" if name == "transformer-engine" else version(name)
        try:
            original(self, *arguments, **named)
        finally:
            metadata.version = version

    return construct


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        f"{_PARTS}.mixins.nlp_adapter_mixins.swap_mcore_mixin",
        "gives a layer its adapters",
        _from_mixins("swap_mcore_mixin"),
        ("transformer_engine",),
    ),
    Replacement(
        f"{_ADAPTERS}.parallel_adapters.ParallelLinearAdapter.__init__",
        "asks for Transformer Engine's version",
        _as_before_transformer_engine,
        ("transformer_engine",),
    ),
    *(
        Replacement(f"{_PARTS}.peft_config.{name}", "layers with adapters", _from_mixins(name), ("transformer_engine",))
        for name in _NAMES
    ),
)
