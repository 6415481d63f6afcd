"""A converted model computes what the Hugging Face model computes, however it is split, and comes back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launch import run
from safetensors.torch import load_file, save_file
from tiny_model import build_hf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tools import hf_to_nemo, nemo_to_hf
from tools.conversion import shards
from tools.hf_to_nemo import ConversionError, convert, vocabulary_padding

WORKER = str(Path(__file__).with_name("nemo_logits_worker.py"))
CHAT = [{"role": "user", "content": "Où est-ce? 東京"}]
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 128, "attn_logit_softcapping": 5.0}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama2": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "rope_scaling": LINEAR}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 24}),
    "llama3_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_theta": 50_000.0}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_theta": 1_000_000.0}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "rope_theta": 1_000_000.0}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA),
}
LAYOUTS = {
    "one": (1, 1, tuple(MODELS)),
    "tensor": (2, 1, ("llama3", "qwen2", "gemma2")),
    # NeMo 2.2 itself cannot build Gemma 2 in stages: it caps the output layer of every stage, which only the last has.
    "pipeline": (1, 2, ("llama3", "qwen2")),
}
"""Tensor and pipeline parallel sizes, and the models that are split so."""
ROWS_BEYOND_TOKENIZER = 3


def write_hf(directory: Path, name: str) -> Path:
    """A random model of the kind `MODELS[name]`; no weight is zero or one, so that none can be mistaken."""
    build_hf(directory)
    model_class, config_class, options = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    sizes = {
        "vocab_size": len(tokenizer) + ROWS_BEYOND_TOKENIZER,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    config = config_class(**{**sizes, **options})
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model in Hugging Face format with its logits, and converted; nothing of the archives may point back."""
    root = tmp_path_factory.mktemp("parity")
    tokens = torch.randint(0, 280, (3, 100), generator=torch.Generator().manual_seed(0))
    np.save(root / "tokens.npy", tokens.numpy())
    for name in MODELS:
        source = write_hf(root / name, name)
        np.save(root / f"{name}.npy", hf_logits(source, tokens))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "_LARGE", 1)  # in pieces, as models of real size are written
            convert(source, root / f"{name}.nemo")
        shutil.move(source, root / f"hf_{name}")
    return root


@torch.no_grad()
def hf_logits(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(str(directory), attn_implementation="eager")
    return model.eval()(tokens).logits.numpy()


@pytest.fixture(scope="module")
def runs(converted: Path) -> Path:
    """NeMo's models at all layouts: one process, then two that split each model in one way and the other."""
    for ranks in (1, 2):
        arguments = [WORKER, str(converted / "tokens.npy")]
        for layout, (tensor, pipeline, models) in LAYOUTS.items():
            if tensor * pipeline == ranks:
                (converted / layout).mkdir()
                files = [str(converted / f"{name}.nemo") for name in models]
                arguments += [str(converted / layout), str(tensor), str(pipeline), *files, "--"]
        run(arguments, ranks=ranks, cwd=converted)
    return converted


@pytest.fixture(params=LAYOUTS)
def evaluated(request: pytest.FixtureRequest, runs: Path) -> Path:
    """Models loaded by NeMo at one layout, saved, and loaded again: `<name>.npy` and `.json`, `<name>_again.nemo`."""
    return runs / request.param


def names(evaluated: Path) -> list[str]:
    return sorted(path.stem for path in evaluated.glob("*.npy"))


def test_logits_equal_those_of_hugging_face(evaluated: Path) -> None:
    models = LAYOUTS[evaluated.name][2]
    assert names(evaluated) == sorted([*models, *(f"{name}_again" for name in models)])
    for name in names(evaluated):
        expected = np.load(evaluated.parent / f"{name.removesuffix('_again')}.npy")
        found = np.load(evaluated / f"{name}.npy")[..., : expected.shape[-1]]
        assert np.abs(expected).max() > 1, "a flat model would agree with anything"
        assert np.abs(found - expected).max() <= 1e-4, name


def test_the_tokenizer_travels_with_its_chat_template(evaluated: Path) -> None:
    for name in names(evaluated):
        facts = json.loads((evaluated / f"{name}.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(str(evaluated.parent / f"hf_{name.removesuffix('_again')}"))
        assert facts["chat"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
        assert facts["additional"] == ["<|user|>", "<|assistant|>"]
        assert facts["eos"] == tokenizer.eos_token_id
        assert facts["padded"] % 8 == 0 and 0 <= facts["padded"] - len(tokenizer) - ROWS_BEYOND_TOKENIZER < 8


def test_the_way_back_is_exact(evaluated: Path) -> None:
    """What NeMo saved, at any layout, is the model that went in: weights bit for bit, configuration, tokenizer."""
    for archive in sorted(evaluated.glob("*_again.nemo")):
        name = archive.stem.removesuffix("_again")
        original = evaluated.parent / f"hf_{name}"
        back = nemo_to_hf.convert(archive, evaluated / f"back_{name}", max_shard=100_000)
        assert_same_model(original, back)


def assert_same_model(original: Path, back: Path) -> None:
    expected, found = read_weights(original), read_weights(back)
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    configs = [AutoConfig.from_pretrained(str(directory)).to_dict() for directory in (original, back)]
    different = {key: value for key, value in configs[0].items() if configs[1][key] != value}
    assert different.keys() <= {"_name_or_path"}, different
    tokenizers = [AutoTokenizer.from_pretrained(str(directory)) for directory in (original, back)]
    texts = [tokenizer.apply_chat_template(CHAT, tokenize=False) for tokenizer in tokenizers]
    assert texts[0] == texts[1] and tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_the_configuration_leaves_the_machine_open(tmp_path: Path) -> None:
    convert(build_hf(tmp_path / "hf"), tmp_path / "m.nemo", "bf16")
    shutil.unpack_archive(tmp_path / "m.nemo", tmp_path / "open", format="tar")
    config = yaml.safe_load((tmp_path / "open" / "model_config.yaml").read_text())
    assert config["precision"] == "bf16"
    for key in ("transformer_engine", "name", "use_cpu_initialization", "megatron_amp_O2", "masked_softmax_fusion"):
        assert key not in config
    assert str(tmp_path) not in (tmp_path / "open" / "model_config.yaml").read_text()
    # Unpacked, the archive is a tokenizer's directory too.
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "open"))) > 0


@given(tokens=st.integers(8, 300_000), extra=st.integers(0, 600))
def test_padding_does_not_depend_on_tensor_parallelism(tokens: int, extra: int) -> None:
    try:
        divisor, padded = vocabulary_padding(tokens, tokens + extra)
    except ConversionError:
        assert tokens <= 56
        return
    for world in (1, 2, 4, 8):
        multiple = divisor * world
        assert -(-tokens // multiple) * multiple == padded
    assert tokens <= padded < tokens + extra + 8


def test_a_tokenizer_with_more_ids_than_rows_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"vocab_size=300.*301 ids"):
        vocabulary_padding(301, 300)


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda hf: edit(hf, architectures=["GPT2LMHeadModel"]),
            r"'GPT2LMHeadModel' is not supported; accepted: Llama",
        ),
        (lambda hf: edit(hf, hidden_act="gelu"), r"hidden_act='gelu'.*accepted: 'silu'"),
        (lambda hf: edit(hf, attention_bias=True), r"attention_bias=True.*accepted: False"),
        (lambda hf: edit(hf, rope_scaling={"rope_type": "yarn", "factor": 2.0}), r"'yarn'.*accepted: linear, llama3"),
        (lambda hf: edit(hf, num_key_value_heads=3), r"3 key-value heads do not divide 4"),
        (lambda hf: (hf / "config.json").unlink(), r"config\.json: no such file"),
        (lambda hf: (hf / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda hf: (hf / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
        (lambda hf: (hf / "model.safetensors").write_bytes(b"torn"), r"model\.safetensors: not a safetensors file"),
        (lambda hf: (hf / "tokenizer.json").unlink(), r"no usable tokenizer"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, spoil, message: str) -> None:
    source = build_hf(tmp_path / "hf")
    spoil(source)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "m.nemo")
    assert not list(tmp_path.glob("*m.nemo*"))


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: str) -> None:
    source, name = build_hf(tmp_path / "hf"), "model.layers.1.mlp.up_proj.weight"
    weights = load_file(source / "model.safetensors")
    tensor = weights.pop(name)
    if change == "shape":
        weights[name] = tensor[:-1].contiguous()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "m.nemo").write_text("old")
    with pytest.raises(ConversionError, match=name):
        convert(source, tmp_path / "m.nemo")
    assert (tmp_path / "m.nemo").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.nemo"]


def test_the_command_line_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        hf_to_nemo.main(["--hf", str(tmp_path), "--out", str(tmp_path / "m.nemo")])
    assert str(stopped.value).startswith("error: ") and "save_pretrained" in str(stopped.value)
