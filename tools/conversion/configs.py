"""Hugging Face's config.json and NeMo's model section, each from the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.planning.shapes import ModelShape, from_huggingface, from_nemo
from tools.conversion.errors import ConversionError

EXTRAS = "huggingface"
"""Section of the model configuration that holds what has no name in NeMo's: NeMo carries it along, and reads it not."""
_GEMMA = "Gemma2ForCausalLM"
_WORLD_SIZES = (1, 2, 4, 8)


def read_huggingface(source: Path) -> tuple[dict[str, Any], ModelShape]:
    """config.json of a Hugging Face directory, and the shape it describes.

    Raises ConversionError where it is missing, or says something that NeMo's models do not have.
    """
    path = source / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; give a directory saved by save_pretrained.")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: not JSON ({error}).") from error
    try:
        shape = from_huggingface(hf)
    except ConfigError as error:
        raise ConversionError(f"{path}: {error}") from error
    if "max_position_embeddings" not in hf:
        raise ConversionError(f"{path}: keys missing: max_position_embeddings.")
    only: dict[str, Any] = {"use_sliding_window": False, "mlp_bias": False, "pretraining_tp": 1}
    # Gemma 2's first key is a leftover: the second decides, by default as here.
    only["hidden_activation" if shape.gemma2 else "hidden_act"] = "gelu_pytorch_tanh" if shape.gemma2 else "silu"
    if not shape.qkv_bias:
        # This puts a bias on the output projection too, which NeMo's qkv_bias does not.
        only["attention_bias"] = False
    for key, accepted in only.items():
        if hf.get(key, accepted) != accepted:
            raise ConversionError(f"{path}: {key}={hf[key]!r} is not supported; accepted: {accepted!r}.")
    return hf, shape


def vocabulary_padding(tokens: int, rows: int) -> tuple[int, int]:
    """(make_vocab_size_divisible_by, padded size) for a tokenizer of `tokens` ids and `rows` embedding rows.

    NeMo pads `tokens` to a multiple of divisor * TP. With divisor = ceil(rows / 8) the outcome is the same at TP 1, 2,
    4 and 8, keeps every row and adds 7 at most; shards could not be reshaped otherwise. Raises ConversionError if the
    tokenizer has ids without a row, or so few ids that no such divisor exists.
    """
    if tokens > rows:
        raise ConversionError(
            f"config.json: vocab_size={rows}, but the tokenizer has {tokens} ids; resize the model's embeddings first."
        )
    for size in (rows, tokens):
        divisor = -(-size // _WORLD_SIZES[-1])
        padded = {-(-tokens // (divisor * world)) * divisor * world for world in _WORLD_SIZES}
        if len(padded) == 1:
            return divisor, padded.pop()
    raise ConversionError(f"a tokenizer of {tokens} ids is too small to be split over {_WORLD_SIZES[-1]} ranks.")


def nemo_config(
    hf: Mapping[str, Any],
    shape: ModelShape,
    divisor: int,
    tokenizer: Any,
    precision: str,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """NeMo's `model` section for a Hugging Face configuration: the model itself, nothing of the machine.

    generation: what generation_config.json says, carried along.
    """
    context = int(hf["max_position_embeddings"])
    config = {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "precision": 32 if precision == "32" else precision,
        "encoder_seq_length": context,
        "max_position_embeddings": context,
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "init_method_std": float(hf.get("initializer_range", 0.02)),
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": float(hf.get("attention_dropout", 0.0)),
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalization": "rmsnorm",
        "layernorm_epsilon": float(hf.get("rms_norm_eps", 1e-6)),
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": divisor,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias": False,
        "qkv_bias": shape.qkv_bias,
        "activation": "fast-swiglu",
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": float(hf.get("rope_theta", 10000.0)),
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": shape.tied,
        "gradient_as_bucket_view": True,
        "resume_from_checkpoint": None,
        "tokenizer": {
            "library": "huggingface",
            "type": None,
            "model": "nemo:tokenizer.json",
            "merge_file": "nemo:tokenizer_config.json",
            "vocab_file": None,
            "use_fast": True,
        },
        "data": {"data_prefix": None, "dataloader_type": "single"},
        "optim": {"name": "adamw", "lr": 1e-6},
        EXTRAS: {"config": dict(hf), "generation": None if generation is None else dict(generation)},
    }
    if tokenizer.additional_special_tokens:
        # NeMo clears the list of a tokenizer that it opens without one.
        config["tokenizer"]["special_tokens"] = {
            "additional_special_tokens": [str(token) for token in tokenizer.additional_special_tokens]
        }
    config.update(_rope_to_nemo(hf.get("rope_scaling")))
    if shape.gemma2:
        config.update(_gemma_to_nemo(hf))
    return config


def huggingface_config(nemo: Mapping[str, Any], tokens: int, dtype: str) -> tuple[dict[str, Any], ModelShape]:
    """config.json for a NeMo model section, and the shape it describes.

    tokens: ids of the tokenizer, the rows of the vocabulary where the section does not say how many the model had.
    dtype: of the weights, as torch names it. Raises ConversionError for a model that none of the architectures is.
    """
    original = dict((nemo.get(EXTRAS) or {}).get("config") or {})
    shape = from_nemo(nemo, int(original.get("vocab_size", tokens)))
    _refuse_others(nemo, shape)
    architecture = _GEMMA if shape.gemma2 else "Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"
    hf = {
        **original,
        "architectures": [architecture],
        "model_type": {_GEMMA: "gemma2", "Qwen2ForCausalLM": "qwen2"}.get(architecture, "llama"),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "max_position_embeddings": int(nemo["max_position_embeddings"]),
        "initializer_range": float(nemo.get("init_method_std", 0.02)),
        "attention_dropout": float(nemo.get("attention_dropout", 0.0)),
        "rms_norm_eps": float(nemo["layernorm_epsilon"]),
        "rope_theta": float(nemo.get("rotary_base", 10000.0)),
        "rope_scaling": _rope_to_huggingface(nemo),
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocabulary,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if shape.qkv_bias:
        # Qwen 2 has no such key: its head is hidden / heads.
        if shape.head_dim * shape.heads != shape.hidden:
            raise ConversionError(f"kv_channels={shape.head_dim} has no place in a Qwen 2 config.json.")
        hf["use_sliding_window"] = False
    else:
        hf["head_dim"] = shape.head_dim
        hf["attention_bias"] = False
    if shape.gemma2:
        custom = nemo.get("mcore_customization_config") or {}
        hf["hidden_act"] = hf["hidden_activation"] = "gelu_pytorch_tanh"
        hf["sliding_window"] = int(nemo["window_size"][0])
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
            hf[key] = custom[key]
        del hf["rope_scaling"]
    else:
        hf["hidden_act"] = "silu"
    return hf, shape


def _refuse_others(nemo: Mapping[str, Any], shape: ModelShape) -> None:
    only = {
        "mcore_gpt": (True,),
        "normalization": ("rmsnorm",),
        "activation": ("geglu", "fast-geglu") if shape.gemma2 else ("fast-swiglu", "swiglu"),
        "position_embedding_type": ("rope",),
        "rotary_percentage": (1.0,),
        "bias": (False,),
        "num_moe_experts": (None,),
        "layernorm_zero_centered_gamma": (True,) if shape.gemma2 else (None, False),
    }
    for key, accepted in only.items():
        if nemo.get(key) not in accepted:
            raise ConversionError(
                f"model_config.yaml: {key}={nemo.get(key)!r} is not supported; accepted: {accepted[0]!r}."
            )


def _gemma_to_nemo(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What NeMo's Gemma 2 layers ask for besides.

    NeMo windows every second layer, from the second on, Gemma every second from the first on: a sequence must not be
    longer than the window.
    """
    return {
        "name": "megatron_gemma2",
        "activation": "geglu",
        "openai_gelu": True,
        # Megatron fuses the other GELU only.
        "bias_activation_fusion": False,
        "layernorm_zero_centered_gamma": True,
        "apply_embedding_scaling": True,
        "window_size": [int(hf.get("sliding_window", 4096)), 0],
        "mcore_customization_config": {
            "attn_logit_softcapping": hf.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": hf.get("final_logit_softcapping", 30.0),
            "query_pre_attn_scalar": hf.get("query_pre_attn_scalar", 256),
        },
    }


def _rope_to_nemo(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = None if not scaling else scaling.get("rope_type", scaling.get("type"))
    if scaling is None or kind in (None, "default"):
        return {}
    if kind == "linear":
        return {"seq_len_interpolation_factor": float(scaling["factor"])}
    if kind == "llama3":
        return {
            "scale_positional_embedding": True,
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    raise ConversionError(f"config.json: rope_scaling type {kind!r} is not supported; accepted: linear, llama3.")


def _rope_to_huggingface(nemo: Mapping[str, Any]) -> dict[str, Any] | None:
    if nemo.get("scale_positional_embedding"):
        return {
            "rope_type": "llama3",
            "factor": float(nemo.get("scale_factor", 8)),
            "low_freq_factor": float(nemo.get("low_freq_factor", 1)),
            "high_freq_factor": float(nemo.get("high_freq_factor", 4)),
            "original_max_position_embeddings": int(nemo.get("old_context_len", 8192)),
        }
    if nemo.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": float(nemo["seq_len_interpolation_factor"])}
    return None
