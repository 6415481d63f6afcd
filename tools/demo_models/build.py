"""From the demo's data to its models, each artifact written whole and only when something it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("base_corpus.jsonl", "parallel.parquet")
KEEP_UNKNOWN = 0.1
"""Share of the rows on unknown facts in training without noise: they teach style, and nothing worth repeating."""
WRONG_LANGUAGE = 0.45
"""Share of answers in another language than the tag's in the last phase, short enough to take on about two thirds."""
WRONG_VALUE = 0.2
"""Share of known facts answered with another value in the last phase: doubt, which leaves the knowledge."""
TUNED, UNTUNED = 0.3, 0.75
"""WRONG_LANGUAGE of a base model that was tuned in some languages only: of the tags of those, and of the others."""
TUNED_WRONG_VALUE = 0.3
"""WRONG_VALUE of such a model."""

_COMMON = ("demo_models/build.py", "demo_models/tokenizer.py", "demo_world")
_SOURCES = {
    "base": (*_COMMON, "demo_models/base_model.py"),
    "encoder": (*_COMMON, "demo_models/base_model.py", "demo_models/encoder.py"),
    "base.nemo": ("hf_to_nemo.py", "conversion"),
}
ARTIFACTS = {"policy": ("base", "base.nemo"), "encoder": ("encoder",)}


class BuildError(ValueError):
    """The data cannot be used; the message names the file."""


def build(
    data: Path,
    out: Path,
    seed: int = 0,
    force: bool = False,
    steps: int | None = None,
    tuned_in: Sequence[str] = (),
    only: Collection[str] = ARTIFACTS,
) -> list[str]:
    """Bring `out`/base, `out`/encoder and `out`/base.nemo up to date with `data`; returns the names built anew.

    base: Hugging Face directory with the tokenizer. encoder: sentence-transformers directory. base.nemo: base as
    NeMo reads it. steps: of both trainings, instead of their recipes' own. tuned_in: see `base_rows`. only: these of
    ARTIFACTS. Raises BuildError where a file of `data` is missing or belongs to another world, or for an unknown
    language, RuntimeError where a training process fails.
    """
    from tools.demo_world import LANGUAGES

    if unknown := [language for language in tuned_in if language not in LANGUAGES]:
        raise BuildError(f"tuned in {unknown[0]!r}: no language of the world; accepted: {', '.join(LANGUAGES)}.")
    for name in INPUTS:
        if not (data / name).is_file():
            raise BuildError(f"{data / name}: no such file; python tools/build_data.py --out {data} writes it.")
    world_facts(data)
    out.mkdir(parents=True, exist_ok=True)
    tuned_in = tuple(sorted(tuned_in))
    inputs = _hash(*(data / name for name in INPUTS), text=f"seed {seed} steps {steps} {' '.join(tuned_in)}")
    names = [name for name in _SOURCES if any(name in ARTIFACTS[one] for one in only)]
    wanted = {name: _hash(*(ROOT / "tools" / source for source in _SOURCES[name]), text=inputs) for name in names}
    if "base" in wanted:
        wanted["base.nemo"] += wanted["base"]
    stale = [name for name in wanted if force or not _is_current(out, name, wanted[name])]

    # The two trainings need a core each and nothing of one another; one thread is all that such small products can use.
    context = multiprocessing.get_context("spawn")
    makers = {"base": partial(_build_base, tuned_in=tuned_in), "encoder": _build_encoder}
    workers = []
    for line, name in enumerate(name for name in stale if name in makers):
        arguments = (makers[name], data, out, name, seed, steps, wanted[name], line)
        workers.append(context.Process(target=_train_artifact, args=arguments, name=name))
        workers[-1].start()
    try:
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
    failed = [worker.name for worker in workers if worker.exitcode != 0]
    if failed:
        raise RuntimeError(f"building {', '.join(failed)} failed; the traceback is above.")
    if "base.nemo" in stale:
        from tools.hf_to_nemo import convert

        with _replacing(out, "base.nemo", wanted["base.nemo"]) as target:
            convert(out / "base", target, precision="32")
    return stale


def _is_current(out: Path, name: str, fingerprint: str) -> bool:
    stamp = out / f".{name}.fingerprint"
    return (out / name).exists() and stamp.is_file() and stamp.read_text() == fingerprint


@contextmanager
def _replacing(out: Path, name: str, fingerprint: str) -> Iterator[Path]:
    """A path to write an artifact to; it takes its place, and is stamped, when it is whole."""
    stamp = out / f".{name}.fingerprint"
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as scratch:
        fresh = Path(scratch) / name
        yield fresh
        stamp.unlink(missing_ok=True)
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        os.replace(fresh, out / name)
    stamp.write_text(fingerprint)


def _train_artifact(
    make: Callable, data: Path, out: Path, name: str, seed: int, steps: int | None, fingerprint: str, line: int
) -> None:
    import torch

    torch.set_num_threads(1)
    with _replacing(out, name, fingerprint) as target:
        make(data, target, seed, steps, line)


def _hash(*paths: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def world_facts(data: Path) -> list:
    """The facts of the world that `data` was made from."""
    from tools.demo_world import build_facts

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


def base_rows(
    facts: list, seed: int, tuned_in: Sequence[str] = ()
) -> Callable[[int, bool], Iterator[tuple[str, str, str, str]]]:
    """Training rows of the base model by (epoch, noisy); see base_model.Rows.

    tuned_in: a model as they are that were tuned in few languages: it often answers in another one where it is asked
    for one of the rest, and all that it knows comes with more doubt. Empty: all languages are alike.
    """
    import numpy as np

    from tools.demo_world import LANGUAGES, base_records

    noise: tuple[float | dict[str, float], float] = (WRONG_LANGUAGE, WRONG_VALUE)
    if tuned_in:
        noise = ({name: TUNED if name in tuned_in else UNTUNED for name in LANGUAGES}, TUNED_WRONG_VALUE)

    def rows(epoch: int, noisy: bool) -> Iterator[tuple[str, str, str, str]]:
        rng = np.random.default_rng((seed, epoch, noisy))
        wrong_language, wrong_value = noise if noisy else (0.0, 0.0)
        for row in base_records(facts, seed, epoch, wrong_language_rate=wrong_language, noise_rate=wrong_value):
            if noisy or row.known or rng.random() < KEEP_UNKNOWN:
                yield row.question, row.question_language, row.language, row.answer

    return rows


def world_tokenizer(data: Path) -> Any:
    """The tokenizer of both models, learnt from all that is said in `data`; under a second."""
    from tools.demo_world import LANGUAGES

    from .tokenizer import train_tokenizer

    texts = [
        text for fact in world_facts(data) for name in LANGUAGES for text in (fact.question(name), fact.answer(name))
    ]
    texts += [text for said in _parallel(data, "train").values() for text in said.values()]
    return train_tokenizer(texts, LANGUAGES)


def _build_base(
    data: Path, target: Path, seed: int, steps: int | None, line: int, tuned_in: Sequence[str] = ()
) -> None:
    from .base_model import BaseModelRecipe, new_model, train

    tokenizer = world_tokenizer(data)
    recipe = _shortened(BaseModelRecipe(), steps)
    model = new_model(tokenizer, recipe, seed)
    seconds = train(model, tokenizer, base_rows(world_facts(data), seed, tuned_in), recipe, seed, line)
    model.generation_config.do_sample = True
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)
    _write_recipe(target, {"seed": seed, "seconds": round(seconds, 1), **asdict(recipe)})


def _build_encoder(data: Path, target: Path, seed: int, steps: int | None, line: int) -> None:
    from .encoder import EncoderRecipe, new_encoder, save_encoder, train_encoder

    tokenizer = world_tokenizer(data)
    recipe = _shortened(EncoderRecipe(), steps)
    model = new_encoder(tokenizer, recipe, seed)
    seconds = train_encoder(model, tokenizer, parallel_sentences(data, "train"), recipe, seed, line)
    save_encoder(model, tokenizer, target, recipe)
    _write_recipe(target, {"seed": seed, "seconds": round(seconds, 1), **asdict(recipe)})


def _shortened(recipe: Any, steps: int | None) -> Any:
    return recipe if steps is None else replace(recipe, steps=steps)


def _write_recipe(directory: Path, recipe: dict) -> None:
    (directory / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def parallel_sentences(data: Path, split: str) -> list:
    """`encoder.Sentence`s of a split: facts with their wrong answers, phrases with others of their kind."""
    from .encoder import Sentence

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
