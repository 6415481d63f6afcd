"""A converted model computes what the Hugging Face model computes, wherever the file lies and however it is split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tools import hf_to_nemo
from tools.hf_to_nemo import ConversionError, convert, vocabulary_padding

WORKER = str(Path(__file__).with_name("nemo_logits_worker.py"))
CHAT = [{"role": "user", "content": "Où est-ce? 東京"}]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_theta": 50_000.0}),
    "untied": (LlamaForCausalLM, LlamaConfig, {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 24}),
    "qwen": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True, "rope_theta": 1_000_000.0}),
}
ROWS_BEYOND_TOKENIZER = 3


def write_hf(directory: Path, name: str) -> Path:
    """A random model of the kind `MODELS[name]`; no weight is zero or one, so that none can be mistaken."""
    build_hf(directory)
    model_class, config_class, options = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    config = config_class(
        vocab_size=len(tokenizer) + ROWS_BEYOND_TOKENIZER,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **options,
    )
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model converted, moved, loaded by NeMo, saved again, loaded again: `<name>.npy` and `.json`, HF beside."""
    root = tmp_path_factory.mktemp("parity")
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    tokens = torch.randint(0, 280, (3, 100), generator=torch.Generator().manual_seed(0))
    np.save(root / "tokens.npy", tokens.numpy())
    files = []
    for name in MODELS:
        source = write_hf(root / f"hf_{name}", name)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(str(source)).eval()(tokens).logits
        np.save(root / f"hf_{name}.npy", logits.numpy())
        made = convert(source, root / f"{name}.nemo")
        files.append(shutil.move(made, elsewhere / f"{name}.nemo"))
        shutil.move(source, root / f"gone_{name}")  # nothing of the archive may point back
    run([WORKER, str(root / "tokens.npy"), str(root), "1", *map(str, files)], cwd=root)
    return root


@pytest.mark.parametrize("copy", ["", "_again"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_hugging_face(evaluated: Path, name: str, copy: str) -> None:
    expected = np.load(evaluated / f"hf_{name}.npy")
    found = np.load(evaluated / f"{name}{copy}.npy")[..., : expected.shape[-1]]
    assert np.abs(expected).max() > 1, "a flat model would agree with anything"
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("copy", ["", "_again"])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_travels_with_its_chat_template(evaluated: Path, name: str, copy: str) -> None:
    facts = json.loads((evaluated / f"{name}{copy}.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(evaluated / f"gone_{name}"))
    assert facts["chat"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert facts["additional"] == ["<|user|>", "<|assistant|>"]
    assert facts["eos"] == tokenizer.eos_token_id
    assert facts["padded"] % 8 == 0 and 0 <= facts["padded"] - len(tokenizer) - ROWS_BEYOND_TOKENIZER < 8


def test_the_shards_load_on_two_tensor_parallel_ranks(evaluated: Path) -> None:
    out = evaluated / "two"
    out.mkdir()
    files = [str(evaluated / "elsewhere" / f"{name}.nemo") for name in ("untied", "qwen")]
    run([WORKER, str(evaluated / "tokens.npy"), str(out), "0", *files], ranks=2, cwd=evaluated)
    for name in ("untied", "qwen"):
        np.testing.assert_allclose(np.load(out / f"{name}.npy"), np.load(evaluated / f"{name}.npy"), atol=1e-4)


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
