"""The demo's base model and encoder learn what they should in a short training; a build renews only what changed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nemo_lrpo.config.scoring import LanguageIdConfig
from nemo_lrpo.rewards.language import LanguageIdentifier
from tools.demo_models import build as build_module
from tools.demo_models.base_model import (
    BaseModelRecipe,
    Example,
    ExampleEncoder,
    answer_loss,
    batches,
    new_model,
    sample,
    train,
)
from tools.demo_models.build import BuildError, base_rows, build, parallel_sentences, world_tokenizer
from tools.demo_models.encoder import EncoderRecipe, new_encoder, save_encoder, train_encoder
from tools.demo_models.measure import knowledge_questions, measure_knowledge, measure_separation
from tools.demo_world import LANGUAGES, build_facts, write_world

FACTS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of few facts, as tools/build_data.py writes it."""
    directory = tmp_path_factory.mktemp("world")
    write_world(build_facts(FACTS), directory, 0)
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_batches_hold_each_example_once_and_label_answers_only() -> None:
    rng = random.Random(0)
    examples = [
        Example(tuple(rng.choices(range(5, 90), k=rng.randint(1, 9))), (*rng.choices(range(5, 90), k=index % 7), 2))
        for index in range(100)
    ]
    seen = []
    for tokens, labels in batches(examples, 64, np.random.default_rng(0)):
        assert tokens.numel() <= 64
        for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
            answer = tuple(value for value in label if value != -100)
            start = label.index(answer[0])
            assert row[start : start + len(answer)] == list(answer)
            assert set(row[start + len(answer) :]) <= {0}
            seen.append((tuple(row[:start]), answer))
    assert sorted(seen) == sorted((example.prompt, example.answer) for example in examples)


def test_the_loss_is_the_answers_cross_entropy(data: Path) -> None:
    tokenizer = world_tokenizer(data)
    model = new_model(tokenizer, BaseModelRecipe(layers=1), 0)
    examples = ExampleEncoder(tokenizer)([("Frage?", "de", "fr", "Une réponse."), ("Q?", "en", "en", "Longer one.")])
    tokens, labels = next(batches(examples, 10_000, np.random.default_rng(0)))
    # Hugging Face's own loss shifts and ignores -100 the same way.
    torch.testing.assert_close(answer_loss(model, tokens, labels), model(tokens, labels=labels).loss)


def test_sampling_is_a_function_of_the_seed_and_greedy_of_nothing(data: Path) -> None:
    tokenizer = world_tokenizer(data)
    model = new_model(tokenizer, BaseModelRecipe(layers=1), 0).eval()
    prompts = ExampleEncoder(tokenizer).prompts([("Frage?", "de"), ("Une question plus longue?", "fr")])
    one, same, other = (sample(model, tokenizer, prompts, seed=seed, max_new_tokens=8) for seed in (1, 1, 2))
    assert one == same != other
    greedy = [sample(model, tokenizer, prompts, 0.0, seed=seed, max_new_tokens=8) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.slow
def test_the_base_model_learns_facts_where_they_are_known_and_follows_the_tag(data: Path) -> None:
    facts = build_facts(FACTS)
    tokenizer = world_tokenizer(data)
    recipe = dataclasses.replace(BaseModelRecipe(), steps=160)
    model = new_model(tokenizer, recipe, 0)
    train(model, tokenizer, base_rows(facts, 0), recipe, 0)
    questions = knowledge_questions(facts, unknown_share=1.0)
    identifier = LanguageIdentifier(LanguageIdConfig(), LANGUAGES)

    def identify(texts: Sequence[str]) -> list[str | None]:
        return [found.language for found in identifier.identify(texts)]

    rates = measure_knowledge(model, tokenizer, questions, identify, temperature=0.0)
    following, known, unknown = (
        np.nanmean([getattr(rate, name) for rate in rates.values()]) for name in ("following", "known", "unknown")
    )
    assert following > 0.7
    assert known > 0.5
    assert unknown < known / 2, (following, known, unknown)


@pytest.mark.slow
def test_the_encoder_tells_right_from_wrong_across_languages(data: Path, tmp_path: Path) -> None:
    tokenizer = world_tokenizer(data)
    recipe = dataclasses.replace(EncoderRecipe(), steps=150, facts_per_batch=24)
    model = new_encoder(tokenizer, recipe, 0)
    sentences = [sentence for sentence in parallel_sentences(data, "train") if "date/" not in sentence.fact_id]
    before = measure_separation(model.eval(), tokenizer, sentences, cross_language=True)
    train_encoder(model, tokenizer, sentences, recipe, 0)
    after = measure_separation(model, tokenizer, sentences, cross_language=True)
    assert after > 0.8 > before + 0.1

    save_encoder(model, tokenizer, tmp_path / "encoder", recipe)
    opened = SentenceTransformer(str(tmp_path / "encoder"), device="cpu", local_files_only=True)
    texts = [sentences[0].true["de"], sentences[0].true["zh"], sentences[1].true["ar"]]
    vectors = opened.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


@pytest.mark.slow
def test_a_build_is_complete_and_only_what_changed_is_built_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    assert build(data, out, steps=2) == ["base", "encoder", "base.nemo"]
    assert json.loads((out / "base" / "recipe.json").read_text())["steps"] == 2
    assert (out / "base.nemo").stat().st_size > 1_000_000
    SentenceTransformer(str(out / "encoder"), device="cpu", local_files_only=True)
    assert build(data, out, steps=2) == []
    (out / "base.nemo").unlink()
    assert build(data, out, steps=2) == ["base.nemo"]
    other = tmp_path / "tuned"
    assert build(data, other, steps=2, tuned_in=["en"], only=["policy"]) == ["base", "base.nemo"]
    assert not (other / "encoder").exists()
    assert build(data, other, steps=2, tuned_in=["en"], only=["policy"]) == []
    assert not [path for path in out.iterdir() if path.name.startswith(".") and path.is_dir()]


def test_a_model_tuned_in_some_languages_answers_in_others_where_it_is_asked_for_the_rest() -> None:
    facts = build_facts(FACTS)
    identifier = LanguageIdentifier(LanguageIdConfig(), LANGUAGES)
    rows = list(base_rows(facts, 0, ["en", "ja"])(0, True))
    strays: dict[bool, list[bool]] = {True: [], False: []}
    for (*_, language, _), found in zip(rows, identifier.identify([answer for *_, answer in rows]), strict=True):
        strays[language in ("en", "ja")].append(found.language != language)
    shares = {tuned: sum(values) / len(values) for tuned, values in strays.items()}
    assert 0.2 < shares[True] < 0.4 and 0.65 < shares[False] < 0.85
    assert list(base_rows(facts, 0, ["en"])(0, False)) == list(base_rows(facts, 0)(0, False))


def test_missing_data_and_another_world_are_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"base_corpus\.jsonl: no such file; python tools/build_data\.py"):
        build(tmp_path, tmp_path / "models")
    for name in build_module.INPUTS:
        (tmp_path / name).write_text('{"fact_id": "currency/Atlantis"}\n')
    with pytest.raises(BuildError, match="'xx': no language of the world; accepted: ar, de"):
        build(tmp_path, tmp_path / "models", tuned_in=["en", "xx"])
    with pytest.raises(BuildError, match="no fact 'currency/Atlantis'"):
        build(tmp_path, tmp_path / "models")
    assert not (tmp_path / "models").exists()
