"""NeMo's LoRA on Megatron-Core's layers, where Transformer Engine is not installed.

NeMo's classes need one name of Transformer Engine, a fused split that may be None; without the name their module cannot
be imported, and NeMo takes it that there are no adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_lrpo.cpu.replacement import TRANSFORMER_ENGINE, Replacement, import_over

_PARTS = "nemo.collections.nlp.parts"
_MODULE = "nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins"
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


REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        f"{_PARTS}.mixins.nlp_adapter_mixins.swap_mcore_mixin",
        "gives a layer its adapters",
        _from_mixins("swap_mcore_mixin"),
        ("transformer_engine",),
    ),
    *(
        Replacement(f"{_PARTS}.peft_config.{name}", "layers with adapters", _from_mixins(name), ("transformer_engine",))
        for name in _NAMES
    ),
)
