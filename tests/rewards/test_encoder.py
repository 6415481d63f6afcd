"""The encoder on real, randomly initialised models of several shapes, against sentence-transformers and by hand."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from encoder_fixture import SENTENCES, SHAPES, build_tiny_encoder
from sentence_transformers import SentenceTransformer, models
from transformers import ModernBertConfig, ModernBertModel

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import EncoderConfig
from nemo_lrpo.rewards.encoder import REFERENCE, RESPONSE, SentenceEncoder, encoder_identity
from nemo_lrpo.rewards.encoder_model import EncoderModel
from nemo_lrpo.rewards.packed_layers import PackedLinear, PackedModernBertLayer, pack_layers
from nemo_lrpo.types import ScoringAbandoned

LONG = "Die Währung von Japan ist der Yen. 日本の通貨は円です。 " * 12
TEXTS = (*SENTENCES, "a", "THE YEN", " \tYen\n", "Der Yen, " * 5, "ין יפני", "\x00", LONG)
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    paths: dict[str, Path] = {}

    def build(shape: str) -> Path:
        if shape not in paths:
            paths[shape] = build_tiny_encoder(tmp_path_factory.mktemp(shape), shape=shape)
        return paths[shape]

    return build


def settings(path: Path, **options: object) -> EncoderConfig:
    return dataclasses.replace(EncoderConfig(path=str(path), device="cpu"), **options)


def library(path: Path, texts: Sequence[str], **options: object) -> np.ndarray:
    """What sentence-transformers itself makes of `texts`, one at a time: no padding."""
    model = SentenceTransformer(str(path), device="cpu")
    return np.stack([model.encode([text], normalize_embeddings=True, **options)[0] for text in texts])


@pytest.mark.parametrize("shape", SHAPES)
def test_embeddings_are_those_of_the_library(built: Built, shape: str) -> None:
    """Prompt, pooling, Dense, padding side and truncation as the model's own files say."""
    encoder = SentenceEncoder(settings(built(shape), long_texts="truncate", batch_tokens=150))
    found = encoder.embed(TEXTS, [RESPONSE] * len(TEXTS))
    assert found.rows.dtype == np.float32
    assert found.rows == pytest.approx(library(built(shape), TEXTS), abs=2e-6)
    assert found.truncated.tolist() == [text == LONG for text in TEXTS] and not found.chunked.any()


def test_prompts_by_name_and_as_text(built: Built) -> None:
    encoder = SentenceEncoder(settings(built("e5"), reference_prompt="query", response_prompt="passage: "))
    for role, name in ((REFERENCE, "query"), (RESPONSE, "passage")):
        expected = library(built("e5"), SENTENCES, prompt_name=name)
        assert encoder.encode(SENTENCES, role=role) == pytest.approx(expected, abs=2e-6)
    assert np.abs(encoder.encode(["Yen"]) - encoder.encode(["Yen"], role=REFERENCE)).max() > 1e-3
    with pytest.raises(
        ConfigError, match="encoder.reference_prompt='qury' is no prompt of the model; accepted: query, passage"
    ):
        SentenceEncoder(settings(built("e5"), reference_prompt="qury"))
    with pytest.raises(ConfigError, match=r"encoder.response_prompt='query' .* none \(the model has no prompts\)"):
        SentenceEncoder(settings(built("labse"), response_prompt="query"))


@pytest.mark.parametrize(("shape", "prompt"), [("plain", ""), ("labse", ""), ("e5", "query: "), ("mmbert", "a b ")])
def test_long_texts_are_read_in_windows(built: Built, shape: str, prompt: str) -> None:
    """Each window has the special tokens and the prompt; windows count by their tokens of text."""
    model = SentenceTransformer(str(built(shape)), device="cpu")
    plain = model.tokenizer(prompt + LONG.strip(), add_special_tokens=False)["input_ids"]
    opening = model.tokenizer(prompt.strip(), add_special_tokens=False)["input_ids"] if prompt else []
    specials = model.tokenizer.num_special_tokens_to_add()
    head, tail = ([2], [3]) if specials else ([], [])
    assert plain[: len(opening)] == opening
    content, room = plain[len(opening) :], 40 - len(opening) - specials
    vectors, weights = [], []
    for start in range(0, len(content), room):
        chunk = content[start : start + room]
        ids = torch.tensor([[*head, *opening, *chunk, *tail]])
        assert ids.shape[1] <= 40
        with torch.no_grad():
            features = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        vectors.append(features["sentence_embedding"][0].numpy())
        weights.append(len(chunk))
    for most in (1000, 3):
        expected = np.average(vectors[:most], axis=0, weights=weights[:most])
        encoder = SentenceEncoder(
            settings(built(shape), max_tokens=40, max_chunks=most, response_prompt=prompt or None, batch_tokens=130)
        )
        found = encoder.embed(["Yen", LONG], [RESPONSE] * 2)
        assert found.rows[1] == pytest.approx(expected / np.linalg.norm(expected), abs=2e-6)
        assert found.chunked.tolist() == [False, True]
        assert found.truncated.tolist() == [False, most == 3]
        counts = encoder.counts()
        assert (counts["encoder_texts"], counts["chunked_texts"], counts["truncated_texts"]) == (2, 1, int(most == 3))


def test_a_text_of_the_window_s_length_is_read_whole(built: Built) -> None:
    tokenizer = SentenceTransformer(str(built("mmbert")), device="cpu").tokenizer
    text = " ".join(["x"] * 60)
    length = len(tokenizer(text)["input_ids"])
    for max_tokens, cut in ((length, False), (length - 1, True)):
        encoder = SentenceEncoder(settings(built("mmbert"), max_tokens=max_tokens))
        assert encoder.embed([text], [RESPONSE]).chunked.tolist() == [cut]


@pytest.mark.parametrize("shape", ["plain", "e5"])
def test_no_text_is_too_strange(built: Built, shape: str) -> None:
    texts = ["", " \n\u3000", "\ud800", "\udfff\ud800 yen", "\x00", "\u202eשלום עולם مرحبا", "\u200b", "e\u0301" * 300]
    texts += ["The yen " * 125_000, "-" * 1_000_000, " " * 1_000_000]
    encoder = SentenceEncoder(settings(built(shape), max_chunks=3))
    found = encoder.embed(texts, [RESPONSE] * len(texts))
    blank = [not text.strip() for text in texts]
    assert np.linalg.norm(found.rows, axis=1) == pytest.approx(np.where(blank, 0.0, 1.0), abs=1e-6)
    assert found.truncated.tolist() == [len(text) >= 600 and not empty for text, empty in zip(texts, blank)]
    assert found.rows[2] == pytest.approx(encoder.encode(["?"])[0], abs=1e-6)
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_an_embedding_does_not_depend_on_its_neighbours(built: Built) -> None:
    encoder = SentenceEncoder(settings(built("mmbert"), batch_tokens=300))
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    order = np.random.default_rng(0).permutation(len(TEXTS) * 2) % len(TEXTS)
    assert encoder.encode([TEXTS[i] for i in order], progress=True) == pytest.approx(alone[order], abs=2e-6)


def test_batches_are_sorted_and_cut_by_tokens(built: Built) -> None:
    lengths = np.random.default_rng(0).integers(1, 120, size=200)
    texts = [" ".join(["x"] * int(length)) + f" {i % 10}" for i, length in enumerate(lengths)]
    encoder = SentenceEncoder(settings(built("plain"), batch_tokens=1000))
    encoder.encode([*texts, *texts])
    counts = encoder.counts()
    real = sum(map(len, SentenceTransformer(str(built("plain"))).tokenizer(sorted(set(texts)))["input_ids"]))
    assert counts["encoder_tokens"] == real and counts["encoder_texts"] == len(set(texts))
    assert counts["encoder_padded_tokens"] <= 1.1 * real
    assert counts["encoder_capacity_tokens"] == 1000 * counts["encoder_batches"] < 2 * real


def test_every_shape_is_run_before_the_first_text(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = PackedLinear.forward

    def spy(layer: PackedLinear, x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        seen.append(x.numel() // x.shape[-1])
        return forward(layer, x, *other)

    monkeypatch.setattr(PackedLinear, "forward", spy)
    encoder = SentenceEncoder(settings(built("mmbert"), batch_tokens=256))
    prepared = set(seen)
    assert prepared == {*range(16, 257, 16), *range(320, 2049, 64)}
    seen.clear()
    for count in range(1, 12):
        encoder.encode([f"{i} yen" + " x" * (3 * i + count) for i in range(count)])
    assert len(set(seen)) > 3 and set(seen) <= prepared


def mkl_threads() -> int:
    """MKL's number for the calling thread; it is not always OpenMP's."""
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else torch.get_num_threads()  # a build of PyTorch without MKL


def test_workers_compute_on_a_core_each_and_leave_other_threads_theirs(built: Built) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen: list[tuple[str, int, int]] = []
        encoder = SentenceEncoder(settings(built("mmbert"), batch_tokens=32))
        encoder._model.modules[0].register_forward_pre_hook(
            lambda *_: seen.append((threading.current_thread().name, torch.get_num_threads(), mkl_threads()))
        )
        texts = [f"{i} yen" + " x" * i for i in range(60)]
        rows = encoder.encode(texts)
        assert {name for name, *_ in seen} <= {"encoder-0", "encoder-1", "encoder-2"}
        assert {tuple(numbers) for _, *numbers in seen} == {(1, 1)}
        assert (torch.get_num_threads(), mkl_threads()) == (3, 3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: (torch.get_num_threads(), mkl_threads())).result() == (3, 3)
        encoder.close()
    finally:
        torch.set_num_threads(threads)
    assert rows == pytest.approx(library(built("mmbert"), texts), abs=2e-6)


def test_memory_is_flat_over_batches_of_all_shapes(built: Built) -> None:
    """Kernels that are compiled for each shape as it comes would take hundreds of MB."""
    encoder = SentenceEncoder(settings(built("mmbert")))
    rng = np.random.default_rng(0)

    def work(calls: int) -> int:
        for _ in range(calls):
            lengths = rng.integers(1, 120, size=int(rng.integers(1, 9)))
            encoder.encode([" ".join(["x"] * int(length)) + f" {rng.integers(1000)}" for length in lengths])
        return psutil.Process().memory_info().rss

    before = work(20)
    assert work(200) < 1.05 * before


def test_threads_share_the_encoder(built: Built) -> None:
    encoder = SentenceEncoder(settings(built("mmbert"), batch_tokens=400))
    expected = encoder.encode(TEXTS)
    before = encoder.counts()

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(TEXTS))
        return np.allclose(encoder.encode([TEXTS[i] for i in order]), expected[order], atol=2e-6)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    assert encoder.counts()["encoder_tokens"] - before["encoder_tokens"] <= 6 * before["encoder_tokens"]


def test_an_abandoned_call_ends_and_the_next_one_is_served(built: Built) -> None:
    encoder = SentenceEncoder(settings(built("plain"), batch_tokens=64))
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 4

    with pytest.raises(ScoringAbandoned):
        encoder.embed([f"{i} yen" for i in range(400)], [RESPONSE] * 400, should_stop)
    assert encoder.counts()["encoder_batches"] <= 4
    with pytest.raises(ScoringAbandoned):
        encoder.embed(["yen"], [RESPONSE], lambda: True)
    assert encoder.counts()["encoder_texts"] == 400, "what is not wanted is not even tokenised"
    assert encoder.encode(["yen"]) == pytest.approx(library(built("plain"), ["yen"]), abs=2e-6)


def test_the_thread_ends_with_the_encoder(built: Built) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("encoder") for thread in threading.enumerate())

    gc.collect()
    before = threads()
    closed, dropped = SentenceEncoder(settings(built("plain"))), SentenceEncoder(settings(built("plain")))
    assert threads() == before + 2 * torch.get_num_threads()
    closed.close()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.encode(["yen"])
    del dropped
    gc.collect()
    assert threads() == before


@pytest.mark.parametrize("shape", ["mmbert", "labse"])
def test_bfloat16_weights_pool_in_float32(built: Built, shape: str) -> None:
    model = EncoderModel(settings(built(shape), dtype="bfloat16"))
    transformer, *others = model.modules
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in transformer.buffers()} <= {torch.float32, torch.int64}
    assert {p.dtype for module in others for p in module.parameters()} <= {torch.float32}
    rows = SentenceEncoder(settings(built(shape), dtype="bfloat16")).encode(SENTENCES)
    exact = library(built(shape), SENTENCES)
    assert rows.dtype == np.float32 and np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-6)
    assert 1e-7 < np.abs(rows @ rows.T - exact @ exact.T).max() < 2e-2


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_layers_compute_what_plain_ones_do(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(48, 96, bias=bias)
    x, other = torch.randn(3, 7, 48, generator=generator), torch.randn(3, 7, 96, generator=generator)
    with torch.inference_mode():
        plain = linear(x)
        expected = {"none": plain, "gelu": torch.nn.functional.gelu(plain), "mul": plain * other, "add": plain + other}
        for then, rows in expected.items():
            packed = PackedLinear(linear.weight, linear.bias, then)
            found = packed(x, other) if then in ("mul", "add") else packed(x)
            assert found.numpy() == pytest.approx(rows.numpy(), abs=1e-5)


def modernbert(**options: object) -> ModernBertModel:
    """Global and local layers, 8 tokens to either side, of random weights far from 0, biases too."""
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "pad_token_id": 0}
    layers = {"num_hidden_layers": 4, "local_attention": 16, "reference_compile": False}
    model = ModernBertModel(ModernBertConfig(**{**sizes, **layers, "attn_implementation": "sdpa", **options})).eval()
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        weights.data.add_(torch.randn(weights.shape, generator=generator), alpha=0.2)
    return model


@pytest.mark.parametrize("biases", [True, False])
def test_packed_modernbert_computes_what_transformers_does(biases: bool) -> None:
    model = modernbert(attention_bias=biases, mlp_bias=biases, norm_bias=biases)
    batches = []
    for width, lengths in ((40, (40, 23, 1)), (5, (5, 5)), (40, (40, 40, 40))):
        mask = torch.tensor([[int(place < length) for place in range(width)] for length in lengths])
        ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
        batches.append((ids, mask))
    with torch.inference_mode():
        expected = [model(ids, attention_mask=mask).last_hidden_state[mask > 0] for ids, mask in batches]
        pack_layers(model)
        assert {type(layer) for layer in model.layers} == {PackedModernBertLayer}
        for (ids, mask), rows in zip(batches, expected):
            found = model(ids, attention_mask=mask).last_hidden_state[mask > 0]
            assert found.numpy() == pytest.approx(rows.numpy(), abs=2e-5)


def test_layers_that_cannot_be_packed_whole_are_packed_inside(built: Built) -> None:
    """Another activation, attention that is not PyTorch's own, another architecture."""
    others = [modernbert(hidden_activation="gelu_pytorch_tanh"), modernbert(attn_implementation="eager")]
    ids = torch.arange(1, 41)[None]
    for model in others:
        with torch.inference_mode():
            expected = model(ids).last_hidden_state
            pack_layers(model)
            assert model(ids).last_hidden_state.numpy() == pytest.approx(expected.numpy(), abs=2e-5)
    for model in (*others, *EncoderModel(settings(built("e5"))).modules):
        assert not any(isinstance(module, torch.nn.Linear | PackedModernBertLayer) for module in model.modules())
    assert all(any(isinstance(module, PackedLinear) for module in model.modules()) for model in others)


def test_the_identity_follows_what_changes_embeddings(built: Built, tmp_path: Path) -> None:
    config = settings(built("e5"))
    same = [
        settings(build_tiny_encoder(tmp_path / "again", shape="e5")),
        dataclasses.replace(config, device="auto", dtype="bfloat16", batch_tokens=7, cache_size=1),
    ]
    copy = Path(shutil.copytree(built("e5"), tmp_path / "copy"))
    (copy / "README.md").write_text("about")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x.json").write_text("{}")
    same.append(settings(copy))
    assert {encoder_identity(one) for one in same} == {encoder_identity(config)}
    truncated = dataclasses.replace(config, long_texts="truncate")
    assert encoder_identity(truncated) == encoder_identity(dataclasses.replace(truncated, max_chunks=5))
    pooling = Path(shutil.copytree(built("e5"), tmp_path / "pooling")) / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace('"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true'))
    others = [
        settings(build_tiny_encoder(tmp_path / "weights", seed=1, shape="e5")),
        settings(pooling.parents[1]),
        truncated,
        dataclasses.replace(config, max_tokens=32),
        dataclasses.replace(config, max_chunks=5),
        dataclasses.replace(config, reference_prompt="query"),
        dataclasses.replace(config, response_prompt="query"),
    ]
    assert len({encoder_identity(one) for one in [config, *others]}) == 1 + len(others)
    assert SentenceEncoder(truncated).identity == encoder_identity(truncated)


def test_encoders_that_cannot_be_used_are_refused(built: Built, tmp_path: Path) -> None:
    path = built("plain")
    with pytest.raises(ConfigError, match=r"encoder\.path is not set"):
        SentenceEncoder(EncoderConfig())
    with pytest.raises(ConfigError, match="holds neither modules.json nor config.json"):
        SentenceEncoder(settings(tmp_path))
    with pytest.raises(ConfigError, match="device='gpu' is not known"):
        SentenceEncoder(settings(path, device="gpu"))
    with pytest.raises(ConfigError, match=r"max_tokens=4096 exceeds the encoder's own limit, 128"):
        SentenceEncoder(settings(path, max_tokens=4096))
    with pytest.raises(ConfigError, match=r"max_tokens=8 leaves no room for text .* encoder.response_prompt"):
        SentenceEncoder(settings(path, max_tokens=8, response_prompt="Which is the same answer? "))
    pickled = Path(shutil.copytree(path, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are not loaded"):
        SentenceEncoder(settings(pickled))
    truncated = Path(shutil.copytree(path, tmp_path / "truncated"))
    (truncated / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ConfigError, match="cannot be loaded on device 'cpu'"):
        SentenceEncoder(settings(truncated))
    model = SentenceTransformer(str(path), device="cpu")
    with torch.no_grad():
        model[0].auto_model.embeddings.LayerNorm.weight.fill_(float("nan"))
    model.save(str(tmp_path / "not_finite"), create_model_card=False)
    with pytest.raises(ConfigError, match="not finite"):
        SentenceEncoder(settings(tmp_path / "not_finite"))
    words = models.StaticEmbedding(model.tokenizer.backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(
        ConfigError, match="asks for the module .sentence_transformers.models.StaticEmbedding.; accepted: "
    ):
        SentenceEncoder(settings(tmp_path / "static"))


def test_a_model_s_directory_runs_no_code(built: Built, tmp_path: Path) -> None:
    def planted(name: str, change: Callable[[Any], None], file: str) -> Path:
        path = shutil.copytree(built("labse"), tmp_path / name)
        (path / "evil.py").write_text("raise SystemExit('its own code ran')")
        [found] = path.glob(file)
        content = json.loads(found.read_text())
        change(content)
        found.write_text(json.dumps(content))
        return path

    module = planted("module", lambda modules: modules[1].update(type="evil.Evil"), "modules.json")
    with pytest.raises(ConfigError, match=r"modules\.json asks for the module 'evil\.Evil'"):
        SentenceEncoder(settings(module))
    activation = planted(
        "activation", lambda dense: dense.update(activation_function="os.abort"), "*_Dense/config.json"
    )
    with pytest.raises(ConfigError, match=r"config\.json asks for 'os\.abort'; accepted: classes of torch\.nn"):
        SentenceEncoder(settings(activation))
    harmless = planted("harmless", lambda modules: None, "modules.json")
    SentenceEncoder(settings(harmless)).close()


def test_positions_limit_a_window_that_the_model_s_files_overstate(built: Built, tmp_path: Path) -> None:
    """XLM-R's 65 positions are 64 tokens; a plain Hugging Face directory does not say so."""
    bare = tmp_path / "bare"
    shutil.copytree(built("e5"), bare)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (bare / name).unlink()
    config = bare / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 64', '"model_max_length": 1000'))
    found = SentenceEncoder(settings(bare)).embed([LONG], [RESPONSE])
    assert found.chunked.all() and np.isfinite(found.rows).all()
