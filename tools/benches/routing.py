"""Planning, tokenising and updating of a training step, against a loop over rows that samples and tokenises each in
full: NumPy's `choice` draws the language, the chat template is written and tokenised, rewards go to tables one by one.

`ratio` is the loop's time over ours for all three together, as in the steps of a run: its questions are known, because
`PromptRenderer.fitting` has measured all of them before the first step. `ratio_first` counts that, too: a step whose
questions nobody has seen. Growth is how planning and updating scale with rows and with languages. Planning and updating
are means over the steps between two updates of the router (`router.update_every`), one update included.

The tokenizer is byte-level BPE with the word pattern and the chat template of Qwen 2.5, learnt on the spot; language
tags are plain text to it. Questions are made-up words, prompts have about 85 tokens. Both sides make the ids of every
row: the loop as lists, ours packed as int32, which is what a tensor takes. One thread, best of --rounds.
Seconds are the processor's (nothing here waits), so that others on the machine count less.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import DataConfig, PromptConfig
from nemo_lrpo.config.loader import CONFIG_DIR, compose, to_dataclass
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.data.languages import language_tag
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.router import build_router
from nemo_lrpo.router.plan import LanguagePlan
from nemo_lrpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOPICS = tuple(f"topic {i}" for i in range(6))
REGIONS = tuple(f"region {i}" for i in range(24))
PUBLISHED_LANGUAGES = len(DataConfig().languages)
ROLLOUTS, RESERVED = 8, 2
QUESTIONS = (256, 2048)
"""Of a step: 2,048 rows, as published, and 16,384."""
GROWING_ROWS = (1_000, 10_000, 100_000, 1_000_000)
GROWING_LANGUAGES = (15, 50, 150, 500)
WINDOWS = 8
"""In the first ones of a run no memory of the default router has proved better than another, and all are asked."""
VOCABULARY = 4096
WORDS = 49
"""Of a question."""
WORDS_OF_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


# --- a world to route in ------------------------------------------------------------------------------------------


def languages_of(count: int) -> tuple[str, ...]:
    """`count` codes: those of the published run, then made-up ones."""
    made_up = ("".join(letters) for letters in product(ascii_lowercase, repeat=2))
    return tuple(dict.fromkeys([*DataConfig().languages, *made_up]))[:count]


class World:
    """Questions of made-up words, half of them with a region, and a reward for every row."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        letters = np.array(list("aaaeeeiioouunnrrssttlldkmbgp"))
        lengths = self._generator.integers(2, 9, size=3000)
        self.words = ["".join(self._generator.choice(letters, size=length)) for length in lengths]
        # Words come as often as in text: the second half as often as the first.
        self._frequency = 1.0 / np.arange(1, len(self.words) + 1)
        self._frequency /= self._frequency.sum()

    def text(self, words: int) -> str:
        chosen = self._generator.choice(len(self.words), size=words, p=self._frequency)
        return " ".join(self.words[i] for i in chosen).capitalize() + "?"

    def prompts(self, count: int, languages: Sequence[str], words: int = 0) -> list[Prompt]:
        """`words` of text in each question; 0: none, where it is not tokenised."""
        draw = self._generator.integers
        rows = zip(*(draw(n, size=count).tolist() for n in (len(languages), len(TOPICS), len(REGIONS), 2)))
        return [
            Prompt(
                question_id=f"q{i}",
                question=self.text(words) if words else "",
                reference="",
                language=languages[language],
                reference_language=languages[language],
                topics=(TOPICS[topic],),
                regions=(REGIONS[region],) * regional,
            )
            for i, (language, topic, region, regional) in enumerate(rows)
        ]

    def rewards(self, count: int) -> NDArray[np.float64]:
        return self._generator.random(count)


def build_tokenizer(world: World) -> PreTrainedTokenizerBase:
    """Byte-level BPE learnt from the world's text; neither template nor tags occur in it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(WORDS_OF_QWEN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    usual = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "<|out_lang_"] * 50
    backend.train_from_iterator([*(world.text(40) for _ in range(2000)), *usual], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


# --- the two sides ------------------------------------------------------------------------------------------------


class RowByRow:
    """A step as a loop over rows: a draw, a chat template and a tokenizer's call each, and tables of averages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._languages = list(languages)
        self._index = {language: i for i, language in enumerate(languages)}
        self._random = np.random.RandomState(0)
        self._topics = {topic: np.zeros(len(languages)) for topic in TOPICS}
        self._regions = {region: np.zeros(len(languages)) for region in REGIONS}

    def plan(self, prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
        rows = []
        for prompt in prompts:
            rows += [(prompt, prompt.language)] * RESERVED
            for _ in range(RESERVED, ROLLOUTS):
                logits = sum(self._topics[topic] for topic in prompt.topics)
                logits = logits + sum((self._regions[region] for region in prompt.regions), np.zeros(len(logits)))
                weights = np.exp(logits - logits.max())
                mixture = 0.2 / len(weights) + 0.8 * weights / weights.sum()
                rows.append((prompt, self._languages[self._random.choice(len(weights), p=mixture)]))
        return rows

    def tokenise(self, rows: Sequence[tuple[Prompt, str]]) -> list[list[int]]:
        ids = []
        for prompt, language in rows:
            chat = [{"role": "user", "content": f"{prompt.question}\n{language_tag(language)}"}]
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids.append(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids

    def update(self, rows: Sequence[tuple[Prompt, str]], rewards: NDArray[np.float64]) -> None:
        buckets: dict[tuple[str, str | None], dict[str, list[float]]] = {}
        for (prompt, language), reward in zip(rows, rewards):
            for topic, region in product(prompt.topics, prompt.regions or (None,)):
                buckets.setdefault((topic, region), {}).setdefault(language, []).append(float(reward))
        for (topic, region), by_language in buckets.items():
            means = {language: float(np.mean(values)) for language, values in by_language.items()}
            centre, spread = np.mean(list(means.values())), np.std(list(means.values()))
            for language, mean in means.items():
                value, column = (mean - centre) / (spread + 1e-6), self._index[language]
                for table in (self._topics[topic], *([] if region is None else [self._regions[region]])):
                    table[column] = 0.9 * table[column] + 0.1 * value


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """The shortest of `rounds` runs."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def router_config(name: str) -> RouterConfig:
    """conf/router/<name>.yaml."""
    tree = compose("train", [f"router={name}", f"router.reserved_slots={RESERVED}"])
    return to_dataclass(RouterConfig, tree.router, "router")


def routing(
    config: RouterConfig, languages: Sequence[str], prompts: Sequence[Prompt], world: World, rounds: int
) -> tuple[dict[str, float], LanguagePlan]:
    """Seconds of planning and updating a step: means over the steps from one of the router's updates to the next, of
    the best of `rounds` such windows, at least WINDOWS. `plan_slowest` is that window's slowest plan, which follows the
    update."""
    router = build_router(config, languages, TOPICS, REGIONS, seed=0)
    rewards = world.rewards(len(prompts) * ROLLOUTS)
    windows = []
    # The first window pays for what is kept: facts about questions.
    for window in range(max(rounds, WINDOWS) + 1):
        planned, updated = [], []
        for step in range(config.update_every):
            start = time.process_time()
            plan = router.route(prompts, ROLLOUTS, window * config.update_every + step)
            planned.append(time.process_time() - start)
            start = time.process_time()
            router.observe(plan, rewards)
            updated.append(time.process_time() - start)
        windows.append({"plan": fmean(planned), "plan_slowest": max(planned), "update": fmean(updated)})
    return min(windows[1:], key=lambda window: window["plan"] + window["update"]), plan


def step_row(name: str, count: int, tokenizer: PreTrainedTokenizerBase, world: World, rounds: int) -> dict[str, Any]:
    """One step of `count` questions, both sides."""
    languages = languages_of(PUBLISHED_LANGUAGES)
    prompts = world.prompts(count, languages, words=WORDS)
    rows = count * ROLLOUTS
    ours, plan = routing(router_config(name), languages, prompts, world, rounds)
    config = PromptConfig(max_tokens=512)
    renderers = [PromptRenderer(tokenizer, config) for _ in range(rounds)]
    fresh = iter(renderers)
    ours["tokenise_first"] = seconds(lambda: next(fresh).render_all(plan), rounds)
    ours["tokenise"] = seconds(lambda: renderers[0].render_all(plan), rounds)
    fitting = iter([PromptRenderer(tokenizer, config) for _ in range(rounds)])
    measured = seconds(lambda: next(fitting).fitting(prompts, languages), rounds)

    loop = RowByRow(tokenizer, languages)
    drawn = loop.plan(prompts)
    ids = loop.tokenise(drawn)
    tagged = renderers[0].render_all(plan)
    check = loop.tokenise([(row.prompt, row.language) for row in plan[:64]])
    if [list(row.token_ids) for row in tagged[:64]] != check:
        sys.exit("bench: the two sides do not give the same token ids")
    rewards = world.rewards(rows)
    theirs = {
        "plan": seconds(lambda: loop.plan(prompts), rounds),
        "tokenise": seconds(lambda: loop.tokenise(drawn), rounds),
        "update": seconds(lambda: loop.update(drawn, rewards), rounds),
    }
    theirs["all"] = sum(theirs.values())
    ours["all"] = ours["plan"] + ours["tokenise"] + ours["update"]
    ours["all_first"] = ours["plan"] + ours["tokenise_first"] + ours["update"]
    return {
        "bench": "routing",
        "router": name,
        "rows": rows,
        "questions": count,
        "languages": len(languages),
        "tokens_per_row": round(sum(map(len, ids)) / rows, 1),
        "ours_s": _rounded(ours),
        "loop_s": _rounded(theirs),
        "rows_per_s": {part: round(rows / ours[part]) for part in ("plan", "tokenise", "tokenise_first", "update")},
        "loop_rows_per_s": {part: round(rows / theirs[part]) for part in ("plan", "tokenise", "update")},
        "fitting_s": round(measured, 4),
        "ratio": round(theirs["all"] / ours["all"], 1),
        "ratio_first": round(theirs["all"] / ours["all_first"], 1),
    }


def growth_row(name: str, count: int, languages: int, world: World, rounds: int) -> dict[str, Any]:
    """Planning and updating of `count` questions."""
    codes = languages_of(languages)
    prompts = world.prompts(count, codes)
    measured, _ = routing(router_config(name), codes, prompts, world, rounds)
    rows = count * ROLLOUTS
    return {
        "bench": "routing_growth",
        "router": name,
        "rows": rows,
        "languages": languages,
        "plan_s": round(measured["plan"], 5),
        "plan_slowest_s": round(measured["plan_slowest"], 5),
        "update_s": round(measured["update"], 5),
        "plan_rows_per_s": round(rows / measured["plan"]),
        "update_rows_per_s": round(rows / measured["update"]),
    }


def _rounded(parts: Mapping[str, float]) -> dict[str, float]:
    return {part: round(value, 5) for part, value in parts.items()}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per size of a step, then growth with rows, then with languages."""
    if options.rounds < 1:
        sys.exit("bench: --rounds must be at least 1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    known = sorted(path.stem for path in (CONFIG_DIR / "router").glob("*.yaml"))
    if options.router not in known:
        sys.exit(
            f"bench: --router {options.router}: there is no such file in conf/router; accepted: {', '.join(known)}"
        )
    world = World()
    try:
        if options.part in ("all", "step"):
            tokenizer = build_tokenizer(world)
            for count in QUESTIONS:
                print(f"bench: a step of {count * ROLLOUTS} rows", file=sys.stderr)
                yield step_row(options.router, count, tokenizer, world, options.rounds)
        if options.part in ("all", "growth"):
            for rows in GROWING_ROWS:
                yield growth_row(options.router, rows // ROLLOUTS, PUBLISHED_LANGUAGES, world, rounds=1)
            for languages in GROWING_LANGUAGES:
                yield growth_row(options.router, QUESTIONS[1], languages, world, options.rounds)
    except ConfigError as error:
        sys.exit(f"bench: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench.py routing`."""
    parser.add_argument("--router", default="default", help="a file of conf/router (default: default)")
    parser.add_argument("--part", choices=("all", "step", "growth"), default="all", help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each part; the shortest counts (default 3)")


def table(row: dict[str, Any]) -> Iterator[str]:
    """The two sides, part by part; or a line of growth."""
    if row["bench"] == "routing_growth":
        yield (
            f"{row['rows']:>9,} rows {row['languages']:>4} languages: plan {1e3 * row['plan_s']:8.2f} ms "
            f"({row['plan_rows_per_s']:>9,} rows/s), update {1e3 * row['update_s']:8.2f} ms "
            f"({row['update_rows_per_s']:>9,} rows/s); slowest plan {1e3 * row['plan_slowest_s']:.2f} ms"
        )
        return
    yield (
        f"router={row['router']}: {row['rows']:,} rows of {row['questions']:,} questions, "
        f"{row['tokens_per_row']} tokens a row, {row['languages']} languages"
    )
    yield f"{'part':16} {'ours ms':>9} {'rows/s':>11} {'loop ms':>9} {'rows/s':>9}"
    for part in ("plan", "tokenise", "tokenise_first", "update"):
        theirs = part if part in row["loop_s"] else "tokenise"
        yield (
            f"{part:16} {1e3 * row['ours_s'][part]:9.2f} {row['rows_per_s'][part]:11,} "
            f"{1e3 * row['loop_s'][theirs]:9.1f} {row['loop_rows_per_s'][theirs]:9,}"
        )
    yield (
        f"ratio = {row['ratio']}, ratio_first = {row['ratio_first']}; "
        f"slowest plan {1e3 * row['ours_s']['plan_slowest']:.2f} ms, fitting {1e3 * row['fitting_s']:.0f} ms"
    )
