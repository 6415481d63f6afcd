"""Texts a second of language identification. `ratio` is LanguageIdentifier on one thread over the plain loop (cut code
blocks out, join the lines, fastText's predict, one text at a time), `threads` its rate with two processes over its rate
with one, `agreement` the share of plain texts, without code or formulas, for which both name the same language.

The texts are the demo world's sentences in 15 languages joined to answers of log-normal length, some of them with code
and a formula. The sides take turns; figures are medians over the rounds: of processor time for `ratio`, so that a busy
machine does not bend it, of wall time for `threads`, which needs two idle cores. `threads_cpu` is processor time of one
process over that of the busier of two: what `threads` is on cores of their own. `threads_possible` is what two
processes that share nothing, each with half of the texts, gain on this machine in the same rounds.

The loop reads all of every text, LanguageIdentifier windows of it: `ratio_whole` is its rate when it reads all as well
(language_id.sample=false), and `agreement_mixed` the share of texts whose sentences are in two languages, a third of
them in one, for which both ways name the same language.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MEDIAN_CHARS, SPREAD = 400, 0.6
"""Length of an answer: log-normal."""
FENCE = re.compile(r"```.*?```", re.DOTALL)
CODE = "\n```python\ndef total(items):\n    return sum(item.price * item.count for item in items)\n```\n"
MATH = " $x = \\frac{a + b}{2} = 42$ "


def answers(count: int, technical: float, seed: int = 0) -> list[tuple[str, bool]]:
    """`count` answers, each with whether it has code and a formula in it, as a share `technical` of them has."""
    from tools.demo_world import LANGUAGES, build_facts, parallel_texts

    sentences: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for text in parallel_texts(build_facts()):
        if text.kind in ("answer", "statement"):
            sentences[text.language].append(text.text)
    draw = random.Random(seed)
    made = []
    for number in range(count):
        language = LANGUAGES[number % len(LANGUAGES)]
        length = draw.lognormvariate(0.0, SPREAD) * MEDIAN_CHARS
        parts = [draw.choice(sentences[language])]
        while sum(map(len, parts)) < length:
            parts.append(draw.choice(sentences[language]))
        extra = draw.random() < technical
        if extra:
            parts[len(parts) // 2 : len(parts) // 2] = [MATH, CODE]
        made.append((" ".join(parts), extra))
    draw.shuffle(made)
    return made


def mixed(texts: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """`count` texts of twelve sentences, every third of them taken from another of `texts` than the rest."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        few, many = draw.sample(texts, 2)
        parts = [draw.choice((few if n % 3 == 0 else many).split(". ")) for n in range(12)]
        draw.shuffle(parts)
        made.append(". ".join(parts))
    return made


def seconds(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """What `clock` says of one call."""
    started = clock()
    work()
    return clock() - started


def children_clock() -> Callable[[], float]:
    """Processor time of the processes that this one has started, in seconds."""
    import psutil

    children = psutil.Process().children()
    return lambda: sum(sum(child.cpu_times()[:2]) for child in children)


def side_by_side(work: Callable[[], object], other: Callable[[], object]) -> None:
    """`work` here and `other` in a copy of this process, at the same time."""
    child = os.fork()
    if not child:
        try:
            other()
        finally:
            os._exit(0)
    work()
    os.waitpid(child, 0)


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result."""
    import fasttext

    from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig
    from nemo_lrpo.rewards.language import LanguageIdentifier, bundled_lid_path
    from nemo_lrpo.rewards.language_helpers import HelpedIdentifier

    languages = ScorerConfig().languages
    config = LanguageIdConfig(path=options.model)
    model = fasttext.load_model(options.model or str(bundled_lid_path()))
    alone = LanguageIdentifier(config, languages)
    thorough = LanguageIdentifier(LanguageIdConfig(path=options.model, sample=False), languages)
    helped = HelpedIdentifier(LanguageIdConfig(path=options.model, threads=2), languages)
    made = answers(options.texts, options.technical)
    texts = [text for text, _ in made]

    def loop() -> list[str]:
        return [model.predict(FENCE.sub("", text).replace("\n", " "), k=1)[0][0] for text in texts]

    def apart() -> None:
        side_by_side(lambda: alone.identify(texts[::2]), lambda: alone.identify(texts[1::2]))

    helper_clock = children_clock()
    try:
        found = alone.identify(texts)
        assert found == helped.identify(texts)
        plain = [
            (ours.language, config.aliases.get(code, code))
            for ours, label, (_, technical) in zip(found, loop(), made, strict=True)
            for code in (label.removeprefix("__label__"),)
            if not technical
        ]
        rounds = []
        helper_started = helper_clock()
        for _ in range(options.rounds):
            loop_s = seconds(time.thread_time, loop)
            ours_s = seconds(time.thread_time, lambda: alone.identify(texts))
            whole_s = seconds(time.thread_time, lambda: thorough.identify(texts))
            one_s = seconds(time.perf_counter, lambda: alone.identify(texts))
            apart_s = seconds(time.perf_counter, apart)
            busy = time.thread_time()
            two_s = seconds(time.perf_counter, lambda: helped.identify(texts))
            rounds.append((loop_s, ours_s, one_s, two_s, time.thread_time() - busy, apart_s, whole_s))
        helper_s = (helper_clock() - helper_started) / options.rounds
    finally:
        helped.close()
    loop_s, ours_s, one_s, two_s, here_s, apart_s, whole_s = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    both = mixed(texts, 500)
    same = sum(
        ours == theirs
        for ours, theirs in zip(*([one.language for one in side.identify(both)] for side in (alone, thorough)))
    )
    yield {
        "bench": "lid",
        "texts": len(texts),
        "characters": round(statistics.mean(map(len, texts))),
        "technical": options.technical,
        "loop_texts_per_s": round(len(texts) / loop_s),
        "texts_per_s": round(len(texts) / ours_s),
        "ratio": round(loop_s / ours_s, 3),
        "ratio_whole": round(loop_s / whole_s, 3),
        "wall_texts_per_s_1": round(len(texts) / one_s),
        "wall_texts_per_s_2": round(len(texts) / two_s),
        "threads": round(one_s / two_s, 3),
        "threads_possible": round(one_s / apart_s, 3),
        "threads_cpu": round(ours_s / max(here_s, helper_s), 3),
        "agreement_mixed": round(same / len(both), 4),
        "agreement": round(sum(ours == theirs for ours, theirs in plain) / len(plain), 4),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench.py lid`."""
    parser.add_argument("--texts", type=int, default=3000, help="answers")
    parser.add_argument("--technical", type=float, default=0.15, help="share of answers with code and a formula")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--model", help="lid.176.ftz or lid.176.bin; without it, the bundled one")


def table(row: dict[str, Any]) -> Iterator[str]:
    """The rates."""
    yield f"{'':24} {'texts/s':>9}"
    for name, key in (
        ("plain loop", "loop_texts_per_s"),
        ("LanguageIdentifier", "texts_per_s"),
        ("wall, one process", "wall_texts_per_s_1"),
        ("wall, two processes", "wall_texts_per_s_2"),
    ):
        yield f"{name:24} {row[key]:9}"
