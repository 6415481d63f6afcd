"""What this machine has: decided once, before NeMo and Megatron-Core are imported."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings

import torch

_GPU_PACKAGES = ("apex", "transformer_engine", "tensorrt_llm")

_NOISE = (
    # jieba, of which NeMo wants nothing here.
    "pkg_resources is deprecated as an API",
    # NeMo and Megatron-Core about their own code.
    "TransformerLayer._get_layer_offset is deprecated",
    "Attribute bert_layer_specs.bert_layer_with_transformer_engine_spec is on a",
    "The `MixedPrecisionPlugin` is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    # NeMo broadcasts its end strings as a view of a bytes object and only reads them.
    "The given NumPy array is not writable",
)
"""Beginnings of warnings that every run gives and that nobody can act on."""

_NEMO_NOISE = re.compile(r"The model: .* does not have field\.name: ", re.DOTALL)
"""NeMo names each option of Megatron-Core that the model's configuration leaves at its default, three times over."""


def ensure_platform() -> str:
    """Prepare this process for NeMo and Megatron-Core; returns the value for `trainer.accelerator`, "gpu" or "cpu".

    Call it before anything imports NeMo, NeMo-Aligner or Megatron-Core; calling it again has no effect. Without a GPU
    the CPU stands in for it (gloo, fp32). With a GPU on which Apex, Transformer Engine or TensorRT-LLM are not
    installed, only their names are stood in for. With all of them nothing is replaced. Raises RuntimeError where it
    is called too late.
    """
    _silence()
    has_gpu = torch.cuda.is_available()
    if has_gpu and all(importlib.util.find_spec(package) is not None for package in _GPU_PACKAGES):
        return "gpu"
    # NeMo asks which of NVIDIA's containers it runs in, and takes any answer.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "none")
    from nemo_lrpo import cpu

    if has_gpu:
        cpu.install_missing()
        return "gpu"
    cpu.install()
    return "cpu"


def _silence() -> None:
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=re.escape(message))
    logger = logging.getLogger("nemo_logger")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    # Checkpoints are written by forked processes, and tokenizers warns about each fork unless this is set.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _is_news(record: logging.LogRecord) -> bool:
    return _NEMO_NOISE.match(str(record.msg)) is None


def model_overrides() -> dict[str, object]:
    """Keys of NeMo's model configuration that this machine decides.

    Without Transformer Engine the layers are Megatron-Core's local ones, and the kernels that Apex would have fused
    are plain operations.
    """
    if torch.cuda.is_available() and all(importlib.util.find_spec(package) for package in _GPU_PACKAGES[:2]):
        # NeMo takes a configuration that does not say so for one without it.
        return {"transformer_engine": True}
    fused = ("masked_softmax", "bias_activation", "bias_dropout_add", "gradient_accumulation")
    return {
        "transformer_engine": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        **{f"{name}_fusion": False for name in fused},
    }
