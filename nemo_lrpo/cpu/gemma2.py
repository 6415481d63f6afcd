"""NeMo's Gemma 2 layers over Megatron-Core's own linear layers, where Transformer Engine is not installed.

NeMo writes Gemma 2's attention (capped scores, alternating windows), its norms after attention and feed-forward layer
and its capped output as classes over two names of Transformer Engine: a norm and a row-parallel linear layer. Here the
classes are NeMo's, the two names are stood in for, and the norms whose weights count from zero, which Megatron-Core
has in Apex's and Transformer Engine's form only, are plain torch.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from nemo_lrpo.cpu.replacement import TRANSFORMER_ENGINE, import_over

_MODULES = "nemo.collections.nlp.models.language_modeling.megatron.gemma2.gemma2_modules"


class ZeroCenteredRMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32, over the last axis."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (1.0 + self.weight.float())).to(values.dtype)


def block_spec(config: Any) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, for a TransformerConfig with Gemma 2's additions.

    Raises ValueError for sequence parallelism, which the plain norms do not know.
    """
    if config.sequence_parallel:
        raise ValueError("model.sequence_parallel=True needs Transformer Engine; accepted for Gemma 2 here: False.")
    modules = _nemo_modules()
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ZeroCenteredRMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=modules.Gemma2DotProductAttention,
                    linear_proj=modules.TERowParallelLinearLayerNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ZeroCenteredRMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=modules.TERowParallelLinearLayerNorm
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine keeps these norms inside the linear layers that follow them.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=ZeroCenteredRMSNorm
    )


def _nemo_modules() -> Any:
    """NeMo's module of Gemma 2's classes."""
    return import_over(_MODULES, TRANSFORMER_ENGINE, TENorm=ZeroCenteredRMSNorm, TERowParallelLinear=RowParallelLinear)
