"""Convert a Llama-architecture Hugging Face directory to a `.nemo` for NeMo's Megatron GPT models.

    python tools/hf_to_nemo.py --hf DIR --out MODEL.nemo [--precision 32|bf16]

The weights are written straight into Megatron-Core's distributed checkpoint, tensor by tensor, without building the
model: no GPU, Apex or Transformer Engine is needed, and the result loads at any tensor and pipeline parallel size and
with either layer spec (shards carry Transformer Engine's names, which Megatron's local spec maps its own onto). What
depends on the machine (layer spec, fusions, precision of training, parallel sizes) is left to the trainer.

Inside the archive:

    model_config.yaml       NeMo's model section
    model_weights/          the distributed checkpoint
    tokenizer.json          the tokenizer; with its neighbour, all that transformers.AutoTokenizer needs
    tokenizer_config.json   special tokens and chat template

NeMo 2.2 has no archive entry for a Hugging Face tokenizer: `tokenizer.type` is a name or a directory outside. The two
files therefore travel under keys that NeMo does carry along when a model is saved again (`tokenizer.model`,
`tokenizer.merge_file`), and `nemo_lrpo.actor.tokenizer.ArchiveTokenizer` opens the directory that they lie in. With
NeMo's own classes, unpack the archive and set `tokenizer.type` to that directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
_WORLD_SIZES = (1, 2, 4, 8)


class ConversionError(ValueError):
    """The directory cannot be converted; the message names the file and what is accepted."""


@dataclass(frozen=True)
class Shape:
    """What the weights' layout depends on. `vocabulary` is padded."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool


def convert(hf_dir: str | Path, out: str | Path, precision: str = "32") -> Path:
    """Write `out` (.nemo) from the Hugging Face directory `hf_dir`; returns its path.

    precision: "32" or "bf16", the type of the stored weights. The file appears complete or not at all. Raises
    ConversionError for another architecture, an unsupported option of it, or missing or inconsistent files.
    """
    source, target = Path(hf_dir), Path(out)
    if precision not in PRECISIONS:
        raise ConversionError(f"precision={precision!r} is not known; accepted: {', '.join(PRECISIONS)}.")
    hf = _read_config(source)
    weights = _Weights(source)
    tokenizer = _load_tokenizer(source)
    divisor, padded = vocabulary_padding(len(tokenizer), int(hf["vocab_size"]))
    shape = _shape(hf, padded, source)
    config = nemo_config(hf, shape, divisor, tokenizer, precision)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        _write_tokenizer(tokenizer, content)
        OmegaConf.save(OmegaConf.create(config), content / "model_config.yaml")
        _write_shards(_megatron_tensors(weights, shape), shape, PRECISIONS[precision], content / "model_weights")
        archive = Path(scratch) / "archive.nemo"
        with tarfile.open(archive, "w:") as tar:
            tar.add(content, arcname=".")
        os.replace(archive, target)
    return target


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


def nemo_config(hf: Mapping[str, Any], shape: Shape, divisor: int, tokenizer: Any, precision: str) -> dict[str, Any]:
    """NeMo's `model` section for a Hugging Face configuration: the model itself, nothing of the machine."""
    context = int(hf["max_position_embeddings"])
    std = float(hf.get("initializer_range", 0.02))
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
        "ffn_hidden_size": int(hf["intermediate_size"]),
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "init_method_std": std,
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
    }
    if tokenizer.additional_special_tokens:
        # NeMo clears the list of a tokenizer that it opens without one.
        config["tokenizer"]["special_tokens"] = {
            "additional_special_tokens": [str(token) for token in tokenizer.additional_special_tokens]
        }
    config.update(_rope_scaling(hf.get("rope_scaling")))
    return config


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path}: no such file; give a directory saved by save_pretrained.")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: not JSON ({error}).") from error
    architecture = (hf.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{path}: architecture {architecture!r} is not supported; accepted: {', '.join(ARCHITECTURES)}."
        )
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    absent = [key for key in (*required, "max_position_embeddings") if key not in hf]
    if absent:
        raise ConversionError(f"{path}: keys missing: {', '.join(absent)}.")
    only = {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False, "pretraining_tp": 1}
    if architecture == "LlamaForCausalLM":
        # Llama's attention_bias puts one on the output projection too, which NeMo's qkv_bias does not.
        only["attention_bias"] = False
    for key, accepted in only.items():
        if hf.get(key, accepted) != accepted:
            raise ConversionError(f"{path}: {key}={hf[key]!r} is not supported; accepted: {accepted!r}.")
    return hf


def _shape(hf: Mapping[str, Any], vocabulary: int, source: Path) -> Shape:
    heads, hidden = int(hf["num_attention_heads"]), int(hf["hidden_size"])
    groups = int(hf.get("num_key_value_heads") or heads)
    if heads % groups:
        raise ConversionError(f"{source / 'config.json'}: {groups} key-value heads do not divide {heads} heads.")
    return Shape(
        layers=int(hf["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=int(hf.get("head_dim") or hidden // heads),
        vocabulary=vocabulary,
        # save_pretrained leaves the key out where it is the class's default, False for both.
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=hf["architectures"][0] == "Qwen2ForCausalLM",
    )


def _rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = None if not scaling else scaling.get("rope_type", scaling.get("type"))
    if kind in (None, "default"):
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


class _Weights:
    """Tensors of a safetensors checkpoint by name, in one file or many; read one at a time."""

    def __init__(self, source: Path):
        index, single = source / "model.safetensors.index.json", source / "model.safetensors"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif single.is_file():
            files = [single.name]
        else:
            raise ConversionError(
                f"{source}: neither {single.name} nor {index.name}; save the model with safe_serialization=True."
            )
        self._source, self._files = source, {}
        for name in files:
            if not (source / name).is_file():
                raise ConversionError(f"{source / name}: no such file, though {index.name} lists it.")
            try:
                handle = safe_open(str(source / name), framework="pt")
            except SafetensorError as error:
                raise ConversionError(f"{source / name}: not a safetensors file ({error}).") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._files:
            raise ConversionError(f"{self._source}: the weights lack {name}.")
        tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{self._source}: {name} has shape {tuple(tensor.shape)}, not {shape}.")
        return tensor

    def rows(self, name: str) -> int:
        return self._files[name].get_slice(name).get_shape()[0] if name in self._files else 0


def _load_tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        # A local path, and no code that the directory may bring.
        tokenizer = AutoTokenizer.from_pretrained(str(source.resolve()), use_fast=True, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{source}: no usable tokenizer ({first}); tokenizer.json is needed.") from error
    if not tokenizer.is_fast:
        raise ConversionError(f"{source}: the tokenizer has no tokenizer.json; save it with a fast tokenizer class.")
    if tokenizer.eos_token is None:
        raise ConversionError(f"{source / 'tokenizer_config.json'}: eos_token is not set; generation needs one.")
    return tokenizer


def _write_tokenizer(tokenizer: Any, content: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        saved = json.loads((Path(scratch) / "tokenizer_config.json").read_text(encoding="utf-8"))
        # Later transformers write the template beside it; two files are all that travels.
        saved.setdefault("chat_template", tokenizer.chat_template)
        text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
        (content / "tokenizer_config.json").write_text(text, encoding="utf-8")
        shutil.copyfile(Path(scratch) / "tokenizer.json", content / "tokenizer.json")


@dataclass(frozen=True)
class _Piece:
    """A tensor of the checkpoint, or one of its parts.

    layer: its place along the leading layer axis, None outside the layers. part: (index, count) along the tensor's
    first axis. resizable: the padded vocabulary may differ when it is loaded.
    """

    key: str
    tensor: torch.Tensor
    layer: int | None = None
    part: tuple[int, int] | None = None
    resizable: bool = False


def _megatron_tensors(weights: _Weights, shape: Shape) -> Iterator[_Piece]:
    """Megatron's tensors of the model, one layer after another.

    Attention's three projections become one, per query group: its queries' rows, then its key's, its value's.
    """
    hidden, dim = shape.hidden, shape.head_dim
    queries = shape.heads * dim
    keys = shape.groups * dim

    def vocabulary(name: str) -> torch.Tensor:
        rows = weights.rows(name)
        table = weights(name, rows, hidden)[: shape.vocabulary]
        return torch.nn.functional.pad(table, (0, 0, 0, shape.vocabulary - table.size(0)))

    def qkv(prefix: str, suffix: str, *columns: int) -> torch.Tensor:
        parts = [
            weights(f"{prefix}.{name}_proj.{suffix}", rows, *columns).unflatten(0, (shape.groups, -1))
            for name, rows in (("q", queries), ("k", keys), ("v", keys))
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)

    yield _Piece("embedding.word_embeddings.weight", vocabulary("model.embed_tokens.weight"), resizable=True)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        ffn = weights.rows(f"{mlp}.gate_proj.weight")
        layered = {
            "self_attention.linear_qkv.layer_norm_weight": weights(f"{prefix}.input_layernorm.weight", hidden),
            "self_attention.linear_qkv.weight": qkv(attention, "weight", hidden),
            "self_attention.linear_proj.weight": weights(f"{attention}.o_proj.weight", hidden, queries),
            "mlp.linear_fc1.layer_norm_weight": weights(f"{prefix}.post_attention_layernorm.weight", hidden),
            "mlp.linear_fc2.weight": weights(f"{mlp}.down_proj.weight", hidden, ffn),
        }
        if shape.qkv_bias:
            layered["self_attention.linear_qkv.bias"] = qkv(attention, "bias")
        for key, tensor in layered.items():
            yield _Piece(f"decoder.layers.{key}", tensor, layer)
        # Two parts, not one tensor: each rank's share of a gated layer is a slice of both.
        for index, name in enumerate(("gate", "up")):
            tensor = weights(f"{mlp}.{name}_proj.weight", ffn, hidden)
            yield _Piece("decoder.layers.mlp.linear_fc1.weight", tensor, layer, (index, 2))
    yield _Piece("decoder.final_layernorm.weight", weights("model.norm.weight", hidden))
    if not shape.tied:
        yield _Piece("output_layer.weight", vocabulary("lm_head.weight"), resizable=True)


_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules whose (empty) fp8 state Transformer Engine demands from a checkpoint."""


def _write_shards(pieces: Iterable[_Piece], shape: Shape, dtype: torch.dtype, directory: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    _fit_writer()
    state: dict[str, Any] = {}
    per_layer = 7 + shape.qkv_bias
    total = 2 + (not shape.tied) + shape.layers * per_layer
    for piece in tqdm(pieces, total=total, desc="converting", unit="tensor"):
        offsets = [] if piece.layer is None else [(0, piece.layer, shape.layers)]
        leading = len(offsets)
        if piece.part is not None:
            offsets.append((leading, *piece.part))
        key = f"model.{piece.key}"
        state[f"{key}/{len(state)}"] = ShardedTensor.from_rank_offsets(
            key,
            piece.tensor.to(dtype).contiguous(),
            *offsets,
            prepend_axis_num=leading,
            allow_shape_mismatch=piece.resizable,
        )
    for layer in range(shape.layers):
        for module in _EXTRA_STATE:
            key = f"model.decoder.layers.{module}._extra_state"
            state[f"{key}/{layer}"] = ShardedObject(key, None, (shape.layers,), (layer,))
    directory.mkdir()
    with _single_process_group():
        # Asked for the asynchronous form and carried out here: the other one waits for a GPU.
        dist_checkpointing.save(state, str(directory), async_sharded_save=True).execute_sync()


def _fit_writer() -> None:
    """Megatron-Core's writer for the installed torch, unless the process has it already."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    from nemo_lrpo.cpu import checkpoint, replacement

    if filesystem_async._write_item is filesystem._write_item:
        replacement.apply((*checkpoint.REPLACEMENTS, *checkpoint.CPU_REPLACEMENTS))


@contextmanager
def _single_process_group() -> Iterator[None]:
    """Checkpointing is collective: a group of one, unless the caller has a group already."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--help` describes it."""
    parser = argparse.ArgumentParser(
        description="Convert a Llama-architecture Hugging Face directory to a .nemo for NeMo's Megatron GPT models."
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="directory with config, safetensors and tokenizer")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .nemo to write; replaced if it exists")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="type of the stored weights (default 32)")
    options = parser.parse_args(arguments)
    try:
        path = convert(options.hf, options.out, options.precision)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
