"""Build Megatron-Core's own models without memory and print what they hold: megatron_worker.py < CASES > FACTS (JSON).

A case: {"model": name in CATALOGUE, "layers": of the rank or null for all, "tensor", "pipeline", "sequence_parallel",
"stage": "first" | "last" | "only", "recompute": null | "full" | "selective", "micro_batch", "length", "state": bool,
"lora": width of NeMo's adapters on all matrices of the frozen model, 0 for none}.
The answers, in the same order: {"parameters": int}; where length is not 0 also "held", bytes that the forward pass
leaves besides the parameters and its output, and "logits" and "logprobs", most bytes there are while the output's
log-probs are computed, with their gradient and without; "chunked_logits" and "chunked_logprobs", the same for chunks of
CHUNK tokens; "sampling", those while ANSWERS tokens are drawn; of a first stage only "passing", most bytes there are in
a pass without gradient. A case with state is made small and answered by {"weights", "gradients", "optimizer"}, bytes in
the buffers of Megatron-Core's data parallelism over all WORLD ranks; "written": what a checkpoint takes of one.

Tensors have shapes and no data, and the process group answers nothing, so that a rank of a 70B model is built in a
second. Transformer Engine's two kernels, which are not here, are stood in for by functions that keep what they keep:
norms their input and a float32 per token, flash attention queries, keys, values, its output and a float32 per head and
token. Everything else is Megatron-Core's: layers, rotation, tensor and sequence parallelism, recomputation.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import ModelParallelConfig, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import dot_product_attention  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import get_default_causal_mask, openai_gelu  # noqa: E402
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import swap_mcore_mixin  # noqa: E402
from nemo.collections.nlp.parts.peft_config import LoraPEFTConfig  # noqa: E402
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from nemo_lrpo.actor.chunked_logprobs import Vocabulary, chunked_logprobs  # noqa: E402
from nemo_lrpo.actor.sampling import sample_tokens  # noqa: E402
from nemo_lrpo.cpu import gemma2  # noqa: E402
from nemo_lrpo.planning.parameters import padded_vocabulary  # noqa: E402
from nemo_lrpo.planning.shapes import CATALOGUE, ModelShape  # noqa: E402

WORLD = 64
CHUNK = 512
ANSWERS = 64


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, weight, values.new_empty(values.shape[:-1], dtype=torch.float32))
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(ctx.saved_tensors[0]), torch.empty_like(ctx.saved_tensors[1])


class Norm(torch.nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return NormFunction.apply(values, self.weight)


class FlashFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value, output = query.contiguous(), key.contiguous(), value.contiguous(), torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FlashAttention(torch.nn.Module):
    def __init__(self, *args: object, **kwargs: object):
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, *args: object, **kwargs: object) -> torch.Tensor:
        return FlashFunction.apply(query, key, value).flatten(2)


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive and were made inside; views of what `model` holds do not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self._storages.pop(key)


def config(shape: ModelShape, case: dict[str, Any]) -> TransformerConfig:
    made = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        tensor_model_parallel_size=case["tensor"],
        pipeline_model_parallel_size=case["pipeline"],
        pipeline_dtype=torch.bfloat16,
        sequence_parallel=case["sequence_parallel"],
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=openai_gelu if shape.gemma2 else torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=not shape.gemma2,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
        persist_layer_norm=False,
        recompute_granularity=case["recompute"],
        recompute_method="uniform" if case["recompute"] == "full" else None,
        recompute_num_layers=1 if case["recompute"] == "full" else None,
    )
    # What NeMo sets on it for Gemma 2.
    made.attn_logit_softcapping, made.query_pre_attn_scalar, made.window_size = 50.0, 256, (4096, 0)
    return made


def add_adapters(model: GPTModel, shape: ModelShape, width: int) -> None:
    """NeMo's own, as its init_peft adds them."""
    tuning = {"target_modules": ["all"], "adapter_dim": width, "adapter_dropout": 0.0, "weight_tying": False}
    section = OmegaConf.create(
        {
            "hidden_size": shape.hidden,
            "ffn_hidden_size": shape.ffn,
            "num_attention_heads": shape.heads,
            "num_query_groups": shape.groups,
            "kv_channels": shape.head_dim,
            "activation": "fast-swiglu",
            "peft": {"lora_tuning": tuning},
        }
    )
    model.requires_grad_(False)
    settings = LoraPEFTConfig(section)
    fields = (field.name for field in dataclasses.fields(ModelParallelConfig))
    # The matrices are bfloat16 from the beginning, and tensors without data cannot be converted in place.
    parallel = ModelParallelConfig(**{**{name: getattr(model.config, name) for name in fields}, "bf16": False})
    for layer in model.decoder.layers:
        for name, adapter in settings.get_config_dict().items():
            for place, mixin in settings.name_key_to_mcore_mixins[name]:
                module = getattr(layer, place)
                swap_mcore_mixin(module, mixin)
                module.add_adapter(name=name, cfg=adapter, base_model_cfg=section, model_parallel_config=parallel)


def build(shape: ModelShape, case: dict[str, Any]) -> GPTModel:
    made = config(shape, case)
    if shape.gemma2:
        block = gemma2.block_spec(dataclasses.replace(made, sequence_parallel=False))
        layer, count = block.layer_specs[0], len(block.layer_specs)
    else:
        layer, count = get_gpt_layer_local_spec(), shape.layers // case["pipeline"]
        if not shape.gemma2:
            layer.submodules.self_attention.submodules.core_attention = FlashAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return GPTModel(
        made,
        TransformerBlockSubmodules([layer] * count, layer_norm=Norm),
        vocab_size=padded_vocabulary(shape),
        max_sequence_length=max(case["length"], 1),
        parallel_output=True,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
        pre_process=case["stage"] in ("first", "only"),
        post_process=case["stage"] in ("last", "only"),
    )


def measure(case: dict[str, Any]) -> dict[str, int]:
    shape = CATALOGUE[case["model"]]
    if case["layers"]:
        shape = dataclasses.replace(shape, layers=case["layers"])
    if case["state"]:
        shape = dataclasses.replace(shape, hidden=128, ffn=256, heads=8, groups=2, head_dim=16, vocabulary=512)
    get_default_causal_mask.cache_clear()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(case["tensor"], case["pipeline"])
    parallel_state.set_pipeline_model_parallel_rank(case["pipeline"] - 1 if case["stage"] == "last" else 0)
    if case["state"]:
        return state(shape, case)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(shape, case)
        facts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        if case["lora"]:
            add_adapters(model, shape, case["lora"])
            return facts | {"held": held(model, shape, case)}
        if case["stage"] == "first" and case["length"]:
            return facts | {"passing": passing(model, case)}
        if case["length"]:
            facts |= {
                "held": held(model, shape, case),
                "logits": logits(shape, case, gradient=True),
                "logprobs": logits(shape, case, gradient=False),
                "chunked_logits": chunked(shape, case, gradient=True),
                "chunked_logprobs": chunked(shape, case, gradient=False),
                "sampling": sampling(shape),
            }
    return facts


def held(model: GPTModel, shape: ModelShape, case: dict[str, Any]) -> int:
    rows, length = case["micro_batch"], case["length"]
    with Live(model) as live:
        tokens = torch.zeros(rows, length, dtype=torch.long)
        if case["stage"] == "last":
            positions = length // case["tensor"] if case["sequence_parallel"] else length
            received = torch.empty(positions, rows, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
            model.set_input_tensor([received])
            del tokens
            tokens = None
        output = model(tokens, None, None)
        return live.bytes - output.untyped_storage().nbytes()


def passing(model: GPTModel, case: dict[str, Any]) -> int:
    tokens = torch.zeros(case["micro_batch"], case["length"], dtype=torch.long)
    with Live(model) as live, torch.no_grad():
        model(tokens, None, None)
        return live.peak


def logits(shape: ModelShape, case: dict[str, Any], gradient: bool) -> int:
    rows, length = case["micro_batch"], case["length"]
    columns = padded_vocabulary(shape) // case["tensor"]
    with Live(torch.nn.Module()) as live:
        tokens = torch.zeros(rows, length, dtype=torch.long)
        output = torch.empty(rows, length, columns, dtype=torch.bfloat16, requires_grad=True)
        if gradient:
            from_parallel_logits_to_logprobs(output.float(), tokens, higher_stability=True).sum().backward()
        else:
            with torch.no_grad():
                from_parallel_logits_to_logprobs(output.float(), tokens, inference_only=True, higher_stability=True)
        return live.peak


def chunked(shape: ModelShape, case: dict[str, Any], gradient: bool) -> int:
    """Of the actor's own function, with a weight as Megatron's data parallelism has it."""
    count, rows = case["micro_batch"] * case["length"], padded_vocabulary(shape) // case["tensor"]
    weight = torch.nn.Parameter(torch.empty(rows, shape.hidden, dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.empty(rows, shape.hidden), False
    hidden = torch.nn.Parameter(torch.empty(count, shape.hidden, dtype=torch.bfloat16))
    targets = torch.zeros(count, dtype=torch.long)
    vocabulary = Vocabulary(size=shape.vocabulary, chunk=CHUNK)
    there = torch.nn.ParameterList([weight, weight.main_grad, hidden])
    with Live(there) as live, torch.set_grad_enabled(gradient):
        logprobs = chunked_logprobs(hidden, weight, None, targets, vocabulary)
        if gradient:
            logprobs.sum().backward()
        return live.peak


def sampling(shape: ModelShape) -> int:
    with Live(torch.nn.Module()) as live:
        logits = torch.empty(ANSWERS, padded_vocabulary(shape))
        policy = (logits / 1.0).log_softmax(-1)
        sample_tokens(logits, torch.empty(ANSWERS, dtype=torch.float64), temperature=1.0)
        del policy
        return live.peak


def state(shape: ModelShape, case: dict[str, Any]) -> dict[str, int]:
    """With real tensors: the optimizer looks into them."""
    model = build(shape, case)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    parallel = DistributedDataParallel(model.config, settings, model)
    options = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(options, [parallel])
    optimizer.step()
    kept = optimizer.optimizer.state
    shards = model.sharded_state_dict()
    written = [*nested_values(shards), *nested_values(optimizer.sharded_state_dict(shards))]
    return {
        "written": sum(
            shard.data.nbytes for shard in written if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        ),
        "weights": sum(buffer.param_data.nbytes for buffer in parallel.buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in parallel.buffers),
        "optimizer": sum(
            parameter.nbytes + sum(value.nbytes for value in kept[parameter].values() if torch.is_tensor(value))
            for group in optimizer.param_groups
            for parameter in group["params"]
        ),
    }


def main() -> None:
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    # The tracker of random states compares them, which needs data; without dropout nothing is drawn.
    tracker = SimpleNamespace(fork=nullcontext)
    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = lambda: tracker
    gemma2._nemo_modules().TENorm = Norm
    print(json.dumps([measure(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
