"""Traces for the cold start of ExpLang: a teacher thinks in given languages, and what it does right is kept.

    python tools/make_traces.py --questions train.parquet --thinking de,en,ja --out traces \\
        --teacher-url http://127.0.0.1:8000/v1 --teacher-model MODEL
    python tools/make_traces.py --questions train.parquet --thinking de,en,ja --out traces \\
        --nemo base.nemo --ask instruct --config evaluate trainer.devices=1
    python tools/make_traces.py --questions train.parquet --thinking de,en,ja --out traces --replies replies.jsonl

The teacher is a model behind an OpenAI-compatible endpoint, a local .nemo (KEY=VALUE at the end are overrides of
--config), or a JSONL file of replies with question_id, language and reply, made elsewhere. --ask says how it is asked.
instruct: the format is explained, for a model that follows instructions. tag (.nemo only): the tag is prefilled, for a
policy that knows the format. choose (.nemo only): nothing is prefilled, and the policy chooses; card.md then says what
it chooses and how it fares.

A reply is kept whose form is whole, whose thinking is in the language of its tag and whose answer is in the question's
language (both by the reward server's identifier), and whose answer is right by --verifier. Each language is asked until
it has --per-language traces; --balance equal then cuts all to the language that has fewest.

OUT gets train.jsonl and validation.jsonl (nemo_lrpo/explang/traces.py says what a row is), rejected.jsonl (each reply
that was not kept, with its reason), card.md (counts and rates) and kept.jsonl: all replies of a model, as they come.
Started again after a stop, the command asks for the rest. With another teacher or other questions it wants another OUT.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError  # noqa: E402
from nemo_lrpo.config.explang import MarksConfig  # noqa: E402
from nemo_lrpo.data.errors import DataError  # noqa: E402
from nemo_lrpo.data.languages import LANGUAGES  # noqa: E402
from nemo_lrpo.data.reader import read_prompts  # noqa: E402
from nemo_lrpo.explang.metrics import outcome_metrics  # noqa: E402
from nemo_lrpo.explang.traces import Trace, languages_of, trace_record  # noqa: E402
from nemo_lrpo.seeding import derive_seed  # noqa: E402
from nemo_lrpo.types import Prompt  # noqa: E402
from tools.preparation.endpoint import Reply, kept_lines  # noqa: E402
from tools.traces.examining import CORRECT_FROM, VERIFIERS, Examined, Examiner  # noqa: E402
from tools.traces.teachers import EndpointTeacher, FileTeacher, NemoTeacher, Request, Teacher  # noqa: E402

ASKS = ("instruct", "tag", "choose")
_RATES = ("count", "well_formed", "compliance", "accuracy", "accuracy_strict", "pass_at_k")
"""Of outcome_metrics, what the card shows."""


class KeptReplies:
    """The replies of this and earlier starts, in a file."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """settings: what the replies depend on. Raises ConfigError where those in the file depend on something else."""
        self._path = path
        told = path.with_suffix(".settings.json")
        self._known: dict[tuple[str, str, int], Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and told.exists():
            before = json.loads(told.read_text(encoding="utf-8"))
            other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            if other:
                raise ConfigError(
                    f"{path} holds replies that differ in {', '.join(other)}; give another --out, or remove the file."
                )
        told.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for record in kept_lines(path):
            try:
                key = record["question_id"], record["language"], record["attempt"]
                self._known[key] = Reply(record["reply"], record["ended"])
            except (KeyError, TypeError):
                continue

    def replies(self, teacher: Teacher, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply | None]]:
        """In any order; the teacher is asked for what is not known yet, and that is kept."""
        left = []
        for request in requests:
            if request.key in self._known:
                yield request, self._known[request.key]
            else:
                left.append(request)
        if not left:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for request, reply in teacher.ask(left):
                if reply is not None:
                    question, language, attempt = request.key
                    row = {"question_id": question, "language": language, "attempt": attempt}
                    row |= {"reply": reply.text.encode("utf-8", "replace").decode("utf-8"), "ended": reply.ended}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    self._known[request.key] = reply
                yield request, reply


@dataclass
class Collection:
    """What has been asked, and what was kept of it."""

    examined: list[Examined] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)

    def add(self, one: Examined) -> None:
        self.examined.append(one)
        if one.trace is not None:
            self.traces.append(one.trace)

    @property
    def rejected(self) -> list[Examined]:
        return [one for one in self.examined if one.trace is None]


def collect(
    ask: Callable[[Sequence[Request]], Iterable[tuple[Request, Reply | None]]],
    examiner: Examiner,
    prompts: Sequence[Prompt],
    languages: Sequence[str | None],
    *,
    at_once: int,
    per_language: int,
    samples: int,
    seed: int,
) -> Collection:
    """Ask in each of `languages` (None: the teacher chooses), questions in an order of the seed, until a language has
    `per_language` traces or no question is left. A question has one trace in a language, and up to `samples` tries;
    where the teacher chooses, all of them are used. at_once: requests that `ask` takes at a time."""
    found = Collection()
    left = {language: _requests(prompts, language, samples, seed) for language in languages}
    have: Counter[str | None] = Counter()
    done: set[tuple[str, str | None]] = set()
    total = sum(per_language if language else samples * len(prompts) for language in languages)
    with tqdm(total=total, desc="traces", unit="trace" if languages[0] else "reply", mininterval=0.5) as bar:
        while left:
            round_: list[Request] = []
            for language in list(left):
                wanted = per_language - have[language] if language else at_once
                chosen = _next(left[language], min(wanted, -(-at_once // len(left))), done)
                if not chosen or wanted <= 0:
                    del left[language]
                round_ += chosen
            replied = sorted(ask(round_), key=lambda one: one[0].key)
            for one in examiner.examine(replied):
                found.add(one)
                language = one.request.language
                if one.trace is not None and language:
                    have[language] += 1
                    done.add((one.request.prompt.question_id, language))
                bar.update(int(one.trace is not None or not language))
            bar.set_postfix(rejected=len(found.rejected), refresh=False)
    return found


def _requests(prompts: Sequence[Prompt], language: str | None, samples: int, seed: int) -> Iterator[Request]:
    order = sorted(prompts, key=lambda prompt: derive_seed("traces", seed, language or "", prompt.question_id))
    for attempt in range(samples):
        for prompt in order:
            yield Request(prompt, language, attempt)


def _next(requests: Iterator[Request], count: int, done: set[tuple[str, str | None]]) -> list[Request]:
    chosen: list[Request] = []
    while len(chosen) < count:
        request = next(requests, None)
        if request is None:
            break
        if (request.prompt.question_id, request.language) not in done:
            chosen.append(request)
    return chosen


def balanced(traces: Sequence[Trace], how: str, per_language: int, languages: Sequence[str]) -> list[Trace]:
    """At most `per_language` traces of each language; with how=equal, as many of each as the language with fewest has.

    Raises DataError, naming it, where a language of `languages` has none, and where there are none at all.
    """
    counts = Counter(trace.language for trace in traces)
    if how == "equal":
        if not traces:
            raise DataError(
                "no trace is left in any language; rejected.jsonl and card.md say why. Ask more questions or another "
                "teacher, or give --balance none if card.md is all that is wanted."
            )
        empty = [language for language in languages if not counts[language]]
        if empty:
            raise DataError(
                f"no trace is left in {', '.join(empty)}; rejected.jsonl says why. Leave such languages out of "
                "--thinking, ask more questions, or give --balance none."
            )
        per_language = min(per_language, *counts.values())
    taken: Counter[str] = Counter()
    kept = []
    for trace in traces:
        taken[trace.language] += 1
        if taken[trace.language] <= per_language:
            kept.append(trace)
    return kept


def aside(trace: Trace, share: float, seed: int) -> bool:
    """Whether a trace is for validation: by its question, in whatever languages that is thought about."""
    return derive_seed("validation", seed, trace.question_id) < share * 2**64


def card(options: argparse.Namespace, found: Collection, kept: Sequence[Trace], seen: Sequence[str]) -> str:
    """Markdown: how many replies were asked for in each language, what they were worth, why they were rejected."""
    lines = ["# Traces", "", f"Written by `{shlex.join(['python', 'tools/make_traces.py', *options.command])}`.", ""]
    asked = Counter(one.request.language or "(own choice)" for one in found.examined)
    right = Counter(trace.language for trace in found.traces)
    final = Counter(trace.language for trace in kept)
    names = sorted({*asked, *right})
    lines += ["| thinking in | asked | right | kept |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {asked[name]} | {right[name]} | {final[name]} |" for name in names]
    lines += [f"| all | {asked.total()} | {right.total()} | {final.total()} |", "", "## Rejected", ""]
    reasons = Counter(one.reason for one in found.rejected)
    lines += ["| reason | replies |", "|---|---:|"]
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    lines += ["", "## Rates", "", "| tag | " + " | ".join(_RATES) + " | selected |"]
    lines += ["|---|" + "---:|" * (len(_RATES) + 1)]
    for name, values in rates(found, seen).items():
        cells = [f"{values[key]:.4g}" if key in values else "" for key in (*_RATES, "selected")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rates(found: Collection, seen: Sequence[str]) -> dict[str, dict[str, float]]:
    """By tag, and for all, seen and unseen ones: explang.metrics.outcome_metrics of the replies."""
    outcomes = [one.outcome for one in found.examined if one.outcome is not None]
    values = outcome_metrics(outcomes, seen, CORRECT_FROM)
    tags = sorted({outcome.language for outcome in outcomes if outcome.language})
    table = {}
    for name in ("all", "seen", "unseen", *tags):
        ending = "" if name == "all" else f"/{name}"
        row = {key: values[key + ending] for key in _RATES if key + ending in values}
        if f"selected{ending}" in values:
            row["selected"] = values[f"selected{ending}"]
        table[name] = row
    return table


def run(options: argparse.Namespace) -> Collection:
    """Do what the command line says. Raises ConfigError and DataError for what has to be mended first."""
    marks = MarksConfig(**dict(options.mark))
    marks.check("--mark")
    prompts = read_prompts(options.questions, sorted(LANGUAGES))
    prompts = prompts[: options.limit] if options.limit else prompts
    languages: list[str | None] = [None] if options.ask == "choose" else list(options.thinking)
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as rooms:
        examiner = rooms.enter_context(
            closing(
                Examiner(
                    marks,
                    options.thinking,
                    sorted({prompt.language for prompt in prompts}),
                    options.verifier,
                    options.max_chars,
                )
            )
        )
        teacher = rooms.enter_context(closing(open_teacher(options, marks)))
        ask = teacher.ask
        if options.replies is None:
            settings = {**teacher.identity(), "questions": _digest(prompts), "marks": asdict(marks)}
            ask = functools.partial(KeptReplies(options.out / "kept.jsonl", settings).replies, teacher)
        prompts = teacher.fitting(prompts, languages)
        found = collect(
            ask,
            examiner,
            prompts,
            languages,
            at_once=teacher.at_once,
            per_language=options.per_language,
            samples=options.samples,
            seed=options.seed,
        )
    _write_lines(options.out / "rejected.jsonl", (one.record() for one in found.rejected))
    seen = options.seen or options.thinking
    wanted = [] if options.ask == "choose" else options.thinking
    try:
        traces = balanced(found.traces, options.balance, options.per_language, wanted)
    except DataError:
        (options.out / "card.md").write_text(card(options, found, [], seen), encoding="utf-8")
        raise
    splits: dict[str, list[Trace]] = {"train": [], "validation": []}
    for trace in traces:
        splits["validation" if aside(trace, options.validation, options.seed) else "train"].append(trace)
    for name, rows in splits.items():
        _write_lines(options.out / f"{name}.jsonl", map(trace_record, rows))
        print(f"{options.out / f'{name}.jsonl'}: {len(rows)} traces in {len(languages_of(rows))} languages")
    (options.out / "card.md").write_text(card(options, found, traces, seen), encoding="utf-8")
    return found


def open_teacher(options: argparse.Namespace, marks: MarksConfig) -> Teacher:
    """The one that the command line names."""
    if options.replies is not None:
        return FileTeacher(options.replies, options.samples)
    if options.nemo is not None:
        # Given as the user would: a path may have signs that mean something to Hydra.
        model = "pretrained_checkpoint.restore_from_path=" + json.dumps(str(options.nemo))
        scratch = options.out / "nemo"
        own = [model, f"evaluation.temperature={options.temperature}"]
        return NemoTeacher(
            options.config,
            [*own, *options.overrides],
            marks,
            told=options.ask == "instruct",
            seed=options.seed,
            scratch=scratch,
        )
    return EndpointTeacher(
        options.teacher_url,
        options.teacher_model,
        marks,
        key_env=options.teacher_key_env,
        concurrency=options.teacher_concurrency,
        timeout_s=options.teacher_timeout,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()[:16]


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    partial.replace(path)


def _codes(text: str) -> list[str]:
    codes = [code.strip() for code in text.split(",")]
    unknown = [code for code in codes if code not in LANGUAGES]
    if unknown or len(set(codes)) < len(codes):
        raise argparse.ArgumentTypeError(f"{text}: give codes among {', '.join(sorted(LANGUAGES))}, each once")
    return codes


def _mark(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    names = MarksConfig.__dataclass_fields__
    if name not in names or not equals:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=TEXT, NAME one of {', '.join(names)}")
    return name, value


def _share(text: str) -> float:
    value = float(text)
    if not (0.0 <= value < 1.0):
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to below 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not (0.0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 on")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_traces.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="questions with references, as data.train")
    add("--out", type=Path, required=True, help="directory of the results, made where missing")
    add("--thinking", type=_codes, required=True, help="codes, by comma, of the languages to think in")
    add("--seen", type=_codes, help="of these, those that count as seen in card.md (default: all)")
    add("--teacher-url", help="base of an OpenAI-compatible endpoint, http://host:port/v1")
    add("--teacher-model", help="model that the endpoint serves")
    add("--teacher-key-env", help="environment variable that holds the endpoint's key")
    add("--teacher-concurrency", type=_positive, default=16, help="replies asked for at once (16)")
    add("--teacher-timeout", type=float, default=600.0, help="seconds for one reply, tries included (600)")
    add("--max-tokens", type=_positive, default=4096, help="of an endpoint's reply (4096)")
    add("--nemo", type=Path, help="a local .nemo in place of an endpoint")
    add("--config", default="evaluate", help="configuration of --nemo, a file of conf (evaluate)")
    add("--replies", type=Path, help="JSONL of replies that are there already, in place of a teacher")
    add("--ask", choices=ASKS, default="instruct", help="how the teacher is asked (instruct)")
    add("--temperature", type=_temperature, default=1.0, help="of the teacher's draws (1)")
    add("--samples", type=_positive, default=1, help="tries at a question in a language (1)")
    add("--verifier", choices=VERIFIERS, default="numeric", help="what says that an answer is right (numeric)")
    add("--per-language", type=_positive, default=500, help="traces wanted in each language (500)")
    add("--balance", choices=("equal", "none"), default="equal", help="traces of the languages (equal)")
    add("--max-chars", type=_positive, default=20000, help="of a reply; longer ones are rejected (20000)")
    add("--validation", type=_share, default=0.05, help="share of the questions set aside (0.05)")
    add("--limit", type=int, default=0, help="questions, the first of the file; 0: all (0)")
    add("--mark", type=_mark, action="append", default=[], metavar="NAME=TEXT", help="a mark of mode.marks")
    add("--seed", type=int, default=0, help="of order, draws and split (0)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of --config, with --nemo")
    options = parser.parse_args(arguments)
    options.command = list(arguments)
    if sum(one is not None for one in (options.teacher_url, options.nemo, options.replies)) != 1:
        parser.error("give one teacher: --teacher-url with --teacher-model, --nemo, or --replies.")
    if options.teacher_url is not None and not options.teacher_model:
        parser.error("--teacher-model is not set; give the name of a model that --teacher-url serves.")
    if options.ask != "instruct" and options.nemo is None:
        parser.error(f"--ask {options.ask} is for --nemo.")
    if options.overrides and options.nemo is None:
        parser.error(f"{options.overrides[0]}: overrides are for --nemo.")
    for name in ("questions", "nemo", "replies"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: no such file or directory")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        found = run(options)
    except (ConfigError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for reason, count in Counter(one.reason for one in found.rejected).most_common():
        print(f"  rejected: {count}, {reason}")
    print(f"{options.out / 'card.md'}; rejected replies with reasons: {options.out / 'rejected.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
