"""From the demo's data to its models, each artifact written whole and only when something it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("base_corpus.jsonl", "parallel.parquet")
KEEP_UNKNOWN = 0.3
"""Share of the rows on unknown facts in training without noise: they teach style, and nothing worth repeating."""

_SOURCES = {
    "base": ("demo_models/build.py", "demo_models/tokenizer.py", "demo_models/base_model.py", "demo_world"),
    "encoder": ("demo_models/build.py", "demo_models/tokenizer.py", "demo_models/encoder.py", "demo_world"),
    "base.nemo": ("hf_to_nemo.py",),
}


class BuildError(ValueError):
    """The data cannot be used; the message names the file."""


def build(data: Path, out: Path, seed: int = 0, force: bool = False) -> list[str]:
    """Bring `out`/base, `out`/encoder and `out`/base.nemo up to date with `data`; returns the names built anew.

    base: Hugging Face directory with the tokenizer. encoder: sentence-transformers directory. base.nemo: base as
    NeMo reads it. Raises BuildError where a file of `data` is missing or belongs to another world.
    """
    for name in INPUTS:
        if not (data / name).is_file():
            raise BuildError(f"{data / name}: no such file; python tools/build_data.py --out {data} writes it.")
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[Path], None]] = {
        "base": lambda target: _build_base(data, target, seed),
        "encoder": lambda target: _build_encoder(data, out / "base", target, seed),
        "base.nemo": lambda target: _build_nemo(out / "base", target),
    }
    built, fingerprint = [], _hash(*(data / name for name in INPUTS), text=f"seed {seed}")
    for name, make in steps.items():
        # Each artifact depends on those before it.
        fingerprint = _hash(*(ROOT / "tools" / source for source in _SOURCES[name]), text=fingerprint)
        stamp = out / f".{name}.fingerprint"
        if not force and (out / name).exists() and stamp.is_file() and stamp.read_text() == fingerprint:
            continue
        stamp.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as scratch:
            fresh = Path(scratch) / name
            make(fresh)
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            os.replace(fresh, out / name)
        stamp.write_text(fingerprint)
        built.append(name)
    return built


def _hash(*paths: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def world_facts(data: Path) -> list:
    """The facts of the world that `data` was made from."""
    from demo_world import build_facts

    with (data / "base_corpus.jsonl").open(encoding="utf-8") as lines:
        wanted = {json.loads(line)["fact_id"] for line in lines}
    facts = [fact for fact in build_facts() if fact.fact_id in wanted]
    if len(facts) != len(wanted):
        unknown = sorted(wanted - {fact.fact_id for fact in facts})
        raise BuildError(
            f"{data / 'base_corpus.jsonl'}: the world has no fact {unknown[0]!r}; write the data again with "
            f"python tools/build_data.py --out {data}."
        )
    return facts


def base_rows(facts: list, seed: int) -> Callable[[int, bool], Iterator[tuple[str, str, str, str]]]:
    """Training rows of the base model by (epoch, noisy); see base_model.Rows."""
    import numpy as np
    from demo_world import base_records

    def rows(epoch: int, noisy: bool) -> Iterator[tuple[str, str, str, str]]:
        rng = np.random.default_rng((seed, epoch, noisy))
        noise = {} if noisy else {"wrong_language_rate": 0.0, "noise_rate": 0.0}
        for row in base_records(facts, seed, epoch, **noise):
            if noisy or row.known or rng.random() < KEEP_UNKNOWN:
                yield row.question, row.question_language, row.language, row.answer

    return rows


def _build_base(data: Path, target: Path, seed: int) -> None:
    from demo_models.base_model import BaseModelRecipe, new_model, train
    from demo_models.tokenizer import train_tokenizer
    from demo_world import LANGUAGES

    facts = world_facts(data)
    texts = [text for fact in facts for name in LANGUAGES for text in (fact.question(name), fact.answer(name))]
    texts += [text for texts_ in _parallel(data, None).values() for text in texts_.values()]
    tokenizer = train_tokenizer(texts, LANGUAGES)
    recipe = BaseModelRecipe()
    model = new_model(tokenizer, recipe, seed)
    seconds = train(model, tokenizer, base_rows(facts, seed), recipe, seed)
    model.generation_config.do_sample = True
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)
    _write_recipe(target, {"seed": seed, "seconds": round(seconds, 1), **asdict(recipe)})


def _build_encoder(data: Path, base: Path, target: Path, seed: int) -> None:
    from demo_models.encoder import EncoderRecipe, new_encoder, save_encoder, train_encoder
    from transformers import AutoTokenizer

    # The base model's tokenizer has seen the same languages.
    tokenizer = AutoTokenizer.from_pretrained(str(base.resolve()), local_files_only=True)
    recipe = EncoderRecipe()
    model = new_encoder(tokenizer, recipe, seed)
    seconds = train_encoder(model, tokenizer, parallel_sentences(data, "train"), recipe, seed)
    save_encoder(model, tokenizer, target, recipe)
    _write_recipe(target, {"seed": seed, "seconds": round(seconds, 1), **asdict(recipe)})


def _build_nemo(base: Path, target: Path) -> None:
    from hf_to_nemo import convert

    convert(base, target, precision="32")


def _write_recipe(directory: Path, recipe: dict) -> None:
    (directory / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def parallel_sentences(data: Path, split: str) -> list:
    """`encoder.Sentence`s of a split: facts with their wrong answers, phrases with others of their kind."""
    from demo_models.encoder import Sentence

    facts = {fact.fact_id: fact for fact in world_facts(data)}
    texts = _parallel(data, split)
    kinds = defaultdict(list)
    for name in texts:
        kinds[name.rsplit("/", 1)[0]].append(name)
    sentences = []
    for name, true in texts.items():
        if name in facts:
            wrong = {language: facts[name].wrong_answers(language) for language in true}
        else:
            # A handful is enough: one is drawn at a time.
            others = [other for other in kinds[name.rsplit("/", 1)[0]] if other != name][:16] or list(texts)[:16]
            wrong = {language: tuple(texts[other][language] for other in others) for language in true}
        sentences.append(Sentence(name, true, wrong))
    return sentences


def _parallel(data: Path, split: str | None) -> dict[str, dict[str, str]]:
    """fact_id -> language -> text, of one split or all."""
    from pyarrow import parquet

    table = parquet.read_table(data / "parallel.parquet", columns=["fact_id", "language", "text", "split"])
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for row in table.to_pylist():
        if split in (None, row["split"]):
            texts[row["fact_id"]][row["language"]] = row["text"]
    return dict(texts)
