"""Per-language evaluation of a policy: each question is answered in its language, once or several times.

`evaluate` answers questions and has them scored; `Suite` measures tasks, by what is written or by log-probabilities.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from nemo_lrpo.config.evaluation import REWARD, TasksConfig
from nemo_lrpo.config.mode import EXPLANG
from nemo_lrpo.data.prompts import PromptRenderer
from nemo_lrpo.explang.metrics import pass_at_k
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.tasks.task import LOGPROB, Item, Task
from nemo_lrpo.training.intervals import Averages, Interval, averages, bootstrap_seed
from nemo_lrpo.training.lengths import ExpectedLengths
from nemo_lrpo.training.metrics import Measured, answer_metrics, rollout_metrics, sample_record
from nemo_lrpo.training.modes import LrpoMode, Mode
from nemo_lrpo.training.protocols import Actor, RewardService
from nemo_lrpo.training.scoring import ScoreCollector, StepRefused, has_reward
from nemo_lrpo.training.stopping import Stop
from nemo_lrpo.types import FLAG_EMPTY, ORIGIN_FIXED, Prompt, Rollouts, RoutedPrompt, Score, StepAbandoned

GRADE_OF_FLAG = {
    "judged_wrong_language": "CORRECT_BUT_WRONG_LANGUAGE",
    "judged_incorrect": "INCORRECT",
    "judged_not_attempted": "NOT_ATTEMPTED",
    FLAG_EMPTY: "NOT_ATTEMPTED",
}
"""Of a judge's flags (rewards/judge.py); an answer without text is not shown to it."""
CORRECT = "CORRECT"
UNGRADED = "UNGRADED"
RIGHT_FROM = 0.5
"""The reward from which on an answer that is right or wrong counts as right; only with language_id.gate=soft are there
any but 0 and 1."""
AnswerKey = tuple[str, str, int]
"""Task, question id, slot: which answer it is."""


@dataclass
class Evaluation:
    """The answers, their scores, and means in all and by language (see `rollout_metrics`)."""

    plan: list[RoutedPrompt]
    rollouts: Rollouts
    scores: dict[str, Score]
    metrics: dict[str, float]


def evaluate(
    actor: Actor,
    rewards: RewardService,
    renderer: PromptRenderer,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    temperature: float,
    max_missing_share: float,
    stop: Stop | None = None,
    lengths: ExpectedLengths | None = None,
    mode: Mode | None = None,
    slots: Sequence[int] | None = None,
) -> Evaluation:
    """Answer and score `prompts`; all ranks call it, all get the result. temperature 0 is greedy. `lengths`: how long
    answers are known to be. mode: None for LRPO. slots: of each prompt, which of its question's answers is drawn (a
    question may be there once for each); None: the first.

    With `stop`, it is given up where that says so: StepAbandoned, or RewardsUnavailable while waiting for scores.

    The seed of an answer is a function of (seed, question id, slot), so that two policies are compared on the same
    draws.
    """
    mode = mode or LrpoMode()
    plan = _plan(prompts, mode, slots)
    scoring = ScoreCollector(rewards, plan)
    seeds = [_draw_seed(seed, routed) for routed in plan]
    should_stop = None if stop is None else stop.must_abandon
    expected = None if lengths is None else lengths.expect(plan)
    rollouts = scoring.generate(actor, renderer.render_all(plan), seeds, temperature, should_stop, expected)
    with nullcontext() if stop is None else stop.cancelling(scoring.cancel):
        scores = scoring.join(actor, max_missing_share)
    tokens = (rollouts.lengths - rollouts.prompt_lengths).tolist()
    metrics = rollout_metrics(plan, rollouts, scores) | mode.metrics(plan, scores, tokens)
    return Evaluation(plan, rollouts, scores, metrics)


@dataclass(frozen=True)
class Draw:
    """An answer that is wanted: to which question, and which of its answers, counted from 0."""

    item: Item
    slot: int = 0

    def key(self, task: str) -> AnswerKey:
        return task, self.item.prompt.question_id, self.slot


@dataclass(frozen=True)
class Answer:
    """What the policy answered to `item`. `tokens`: of the answer, None where the answer was an option's log-prob.
    `thinking`: the language that it was made to think in. `slot`: which of the question's answers it is."""

    item: Item
    text: str
    tokens: int | None
    ended: bool
    valid: bool
    score: Score | None
    thinking: str | None = None
    slot: int = 0

    @property
    def draw(self) -> Draw:
        return Draw(self.item, self.slot)

    @property
    def routed(self) -> RoutedPrompt:
        """What was answered."""
        return _routed(self.item.prompt, self.thinking, self.slot)

    @property
    def measured(self) -> Measured:
        return Measured(self.item.prompt.language, self.tokens, self.ended, self.valid, self.score)

    def record(self, task: str) -> dict[str, Any]:
        """As a readable JSON object."""
        sample = sample_record(self.routed, self.text, self.ended, self.score, None)
        return {"task": task, **sample, "parallel": self.item.parallel, "tokens": self.tokens, "valid": self.valid}

    @classmethod
    def of(cls, item: Item, record: Mapping[str, Any]) -> Answer:
        """What `record` wrote of `item`. Raises KeyError, TypeError or ValueError for another object."""
        score = record["score"]
        return cls(
            item,
            record["response"],
            record["tokens"],
            record["ended"],
            record["valid"],
            None if score is None else Score(**{**score, "flags": tuple(score["flags"])}),
            record.get("thinking"),
            int(record["sample_id"].rpartition("/")[2]),
        )


@dataclass(frozen=True)
class TaskResult:
    """A task's measure. `metric`: what is averaged, `reward`, or `accuracy` where an answer is right or wrong. Answers
    without a value are left out of `averages` and counted in `metrics` as missing. `grades`: answers by a judge's
    grade. `wrong_language`: answers in another language than the question's, of those whose language can be said. Where
    a question has several answers, all counts are of answers. `passes`: see `passes_of`; empty where each has one."""

    task: Task
    metric: str
    averages: Averages
    metrics: Mapping[str, float]
    grades: Mapping[str, int]
    wrong_language: int
    unseen: Collection[str]
    passes: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """`<task>/<metric>` in all, `.../<metric>/de` by language, `.../<metric>_macro`, `_seen`, `_unseen` with `_low`
        and `_high`; `.../grade/<name>` as shares; `.../count`, `missing` and `wrong_language` as numbers of answers;
        `.../pass_at_k/<k>` and `.../pass_at_k/<k>/de`; what the mode measures, by its names."""
        found, name = self.averages, f"{self.task.name}/{self.metric}"
        values = {name: found.all.mean, f"{self.task.name}/wrong_language": float(self.wrong_language)}
        values |= {f"{name}/{language}": one.mean for language, one in found.languages.items()}
        for group, one in (("macro", found.macro), ("seen", found.seen), ("unseen", found.unseen)):
            if one is not None:
                values |= {
                    f"{name}_{group}": one.mean,
                    f"{name}_{group}_low": one.low,
                    f"{name}_{group}_high": one.high,
                }
        total = max(sum(self.grades.values()), 1)
        values |= {f"{self.task.name}/grade/{grade}": count / total for grade, count in self.grades.items()}
        values |= {f"{self.task.name}/pass_at_k/{key}": value for key, value in self.passes.items()}
        kept = ("count", "missing", "length", "ended")
        values |= {
            f"{self.task.name}/{key}": value
            for key, value in self.metrics.items()
            if key in kept or key.startswith(f"{EXPLANG}/")
        }
        return values

    def tree(self) -> dict[str, Any]:
        """The whole of it as JSON values."""
        found = self.averages
        return {
            "kind": self.task.kind,
            "method": self.task.method,
            "metric": self.metric,
            "all": asdict(found.all),
            "macro": asdict(found.macro),
            "seen": found.seen and asdict(found.seen),
            "unseen": found.unseen and asdict(found.unseen),
            "languages": {
                language: {**asdict(one), "seen": language not in self.unseen}
                for language, one in found.languages.items()
            },
            **({"grades": dict(self.grades)} if self.grades else {}),
            **({"pass_at_k": dict(self.passes)} if self.passes else {}),
            "wrong_language": self.wrong_language,
            "metrics": dict(self.metrics),
        }

    def line(self) -> str:
        """In words."""
        found = self.averages
        groups: list[tuple[str, Interval | None]] = [("macro", found.macro)]
        if found.unseen is not None:
            groups += [("seen", found.seen), ("unseen", found.unseen)]
        parts = [f"{name} {_words(one)}" for name, one in groups if one is not None]
        grades = ", ".join(f"{grade} {count}" for grade, count in self.grades.items())
        passes = ", ".join(f"pass@{k} {value:.4f}" for k, value in self.passes.items() if "/" not in k)
        return (
            f"{self.task.name}: {found.all.count} answers, mean {self.metric} {found.all.mean:.4f}; {', '.join(parts)}"
            + (f"; {passes}" if passes else "")
            + (f"; {grades}" if grades else "")
        )


class Suite:
    """Tasks with what scores them. `services`: by task; tasks answered by log-prob need none. `languages`: those of the
    training, by which a task's are seen or unseen where the configuration does not say."""

    def __init__(
        self,
        tasks: Sequence[Task],
        services: Mapping[str, RewardService],
        config: TasksConfig,
        *,
        languages: Sequence[str],
        seed: int,
        max_missing_share: float,
        mode: Mode | None = None,
    ):
        """mode: None for LRPO."""
        self._mode = mode or LrpoMode()
        self.tasks = list(tasks)
        self._services = services
        self._config = config
        self._languages = languages
        self._seed = seed
        self._max_missing_share = max_missing_share

    def fit(self, renderer: PromptRenderer) -> None:
        """Leave out, or refuse with DataError, the questions that are longer than prompt.max_tokens (by
        prompt.over_long), each in its own language."""
        for number, task in enumerate(self.tasks):
            prompts = [replace(item.prompt, fixed_language=item.prompt.language) for item in task.items]
            thinking = {language for prompt in prompts if (language := self._mode.thinking(prompt)) is not None}
            fitting = {p.question_id for p in renderer.fitting(prompts, self._languages, sorted(thinking))}
            items = tuple(item for item in task.items if item.prompt.question_id in fitting)
            self.tasks[number] = replace(task, items=items)

    def draws(self, task: Task) -> list[Draw]:
        """All answers that are wanted: the first to each question, then the second to each. The first ones are the same
        however many there are."""
        return [Draw(item, slot) for slot in range(self._samples(task)) for item in task.items]

    def batches(self, draws: Sequence[Draw]) -> Iterator[Sequence[Draw]]:
        """What is answered at a time."""
        for start in range(0, len(draws), self._config.batch_size):
            yield draws[start : start + self._config.batch_size]

    def answer(
        self, actor: Actor, renderer: PromptRenderer, task: Task, draws: Sequence[Draw], stop: Stop | None = None
    ) -> list[Answer]:
        """All ranks: some of the task's answers, in the order of `draws`. Raises as `evaluate` does."""
        if task.method == LOGPROB:
            if stop is not None and actor.max_over_ranks(int(stop.must_abandon())):
                raise StepAbandoned("told to stop between two batches of an evaluation.")
            return choose(actor, renderer, task, [draw.item for draw in draws])
        try:
            result = evaluate(
                actor,
                self._services[task.name],
                renderer,
                [draw.item.prompt for draw in draws],
                slots=[draw.slot for draw in draws],
                seed=self._seed,
                temperature=self._config.temperature,
                max_missing_share=self._max_missing_share,
                stop=stop,
                mode=self._mode,
            )
        except StepRefused as error:
            raise type(error)(f"task {task.name}: {error}") from error
        rollouts = result.rollouts
        return [
            Answer(
                draw.item,
                text,
                int(tokens),
                bool(ended),
                bool(valid),
                result.scores.get(routed.sample_id),
                routed.thinking,
                draw.slot,
            )
            for draw, routed, text, tokens, ended, valid in zip(
                draws,
                result.plan,
                actor.decode(rollouts, range(len(draws))),
                (rollouts.lengths - rollouts.prompt_lengths).tolist(),
                rollouts.ended.tolist(),
                rollouts.valid.tolist(),
                strict=True,
            )
        ]

    def result(self, task: Task, answers: Sequence[Answer]) -> TaskResult:
        """What `answers` say of the policy."""
        unseen = self._config.unseen_languages
        if unseen is None:
            unseen = [language for language in task.languages if language not in self._languages]
        valued = [answer for answer in answers if has_reward(answer.score)]
        found = averages(
            [answer.score.reward for answer in valued if answer.score and answer.score.reward is not None],
            [answer.item.prompt.language for answer in valued],
            [answer.item.parallel for answer in valued],
            unseen=unseen,
            seed=bootstrap_seed(self._seed, task.name),
        )
        judged = task.verifier == "judge"
        metrics = answer_metrics([answer.measured for answer in answers])
        if task.method != LOGPROB:
            scores = {answer.routed.sample_id: answer.score for answer in answers if answer.score is not None}
            metrics |= self._mode.metrics([one.routed for one in answers], scores, [one.tokens for one in answers])
        metric, samples = "reward" if task.verifier == REWARD else "accuracy", self._samples(task)
        return TaskResult(
            task=task,
            metric=metric,
            averages=found,
            metrics=metrics,
            grades=Counter(sorted(grade_of(answer.score) for answer in answers)) if judged else {},
            wrong_language=sum(_in_another_language(answer) for answer in answers),
            unseen=unseen,
            passes=passes_of(answers, samples) if metric == "accuracy" and samples > 1 else {},
        )

    def _samples(self, task: Task) -> int:
        """Answers to each of the task's questions."""
        return 1 if task.method == LOGPROB else self._config.samples

    def measure(self, actor: Actor, renderer: PromptRenderer, stop: Stop | None = None) -> dict[str, float]:
        """All ranks: answer every question of every task; TaskResult.flat of all tasks."""
        values: dict[str, float] = {}
        for task in self.tasks:
            answers: list[Answer] = []
            wanted = self.draws(task)
            with tqdm(
                desc=task.name,
                total=len(wanted),
                unit="answer",
                delay=2.0,
                leave=False,
                disable=not actor.is_main,
            ) as bar:
                for draws in self.batches(wanted):
                    answers += self.answer(actor, renderer, task, draws, stop)
                    bar.update(len(draws))
            values |= self.result(task, answers).flat()
        return values


def choose(actor: Actor, renderer: PromptRenderer, task: Task, items: Sequence[Item]) -> list[Answer]:
    """All ranks: of each item the candidate to which the policy gives most probability after the prompt.

    With c's tokens following the prompt's, a candidate's value is the sum of their log-probs, over c's bytes in UTF-8
    where task.by_byte. Of equal ones the first is taken. The score's measure `margin` is the difference to the best
    other candidate.
    """
    prompts = renderer.render_all(_plan([item.prompt for item in items]))
    rows = [
        (prompt.token_ids, renderer.tokens_of(candidate))
        for item, prompt in zip(items, prompts, strict=True)
        for candidate in item.candidates
    ]
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    lengths = torch.tensor([len(prompt) + len(candidate) for prompt, candidate in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, (prompt, candidate) in enumerate(rows):
        tokens[number, : lengths[number]] = torch.tensor((*prompt, *candidate))
    values = iter(actor.continuation_logprobs(tokens, prompt_lengths, lengths).tolist())
    answers = []
    for item in items:
        by_candidate = [
            next(values) / (len(candidate.encode()) if task.by_byte else 1) for candidate in item.candidates
        ]
        best = max(range(len(by_candidate)), key=by_candidate.__getitem__)
        others = [value for number, value in enumerate(by_candidate) if number != best]
        right = float(best == item.answer)
        (routed,) = _plan([item.prompt])
        score = Score(
            routed.sample_id,
            right,
            right,
            1.0,
            None,
            0.0,
            parts={"choice": right},
            measures={"margin": by_candidate[best] - max(others)},
        )
        answers.append(Answer(item, item.candidates[best], None, True, True, score))
    return answers


def passes_of(answers: Sequence[Answer], samples: int) -> dict[str, float]:
    """pass@k, for k = 1, 2, 4, ... below `samples` and k = samples: `<k>` over all questions, `<k>/<language>` over
    those of a language.

    The mean over questions of 1 - C(n - c, k) / C(n, k), c of the question's n answers being right. Answers without a
    value are not among the n; a question with n < k is left out of that k, and a mean over nothing has no entry.
    """
    rights: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for answer in answers:
        if answer.score is not None and answer.score.reward is not None and has_reward(answer.score):
            prompt = answer.item.prompt
            rights[prompt.language, prompt.question_id].append(answer.score.reward >= RIGHT_FROM)
    powers = [1 << power for power in range(samples.bit_length())]
    found: dict[str, list[float]] = defaultdict(list)
    for k in sorted({*powers, samples}):
        for (language, _), own in sorted(rights.items()):
            if len(own) >= k:
                for name in (f"{k}", f"{k}/{language}"):
                    found[name].append(pass_at_k(len(own), sum(own), k))
    return {name: fmean(values) for name, values in found.items()}


def grade_of(score: Score | None) -> str:
    """The judge's grade of an answer by its name, UNGRADED where there is none."""
    flags = () if score is None else score.flags
    for flag, grade in GRADE_OF_FLAG.items():
        if flag in flags:
            return grade
    return CORRECT if score is not None and score.quality == 1.0 else UNGRADED


def task_digest(task: Task) -> str:
    """Of what is asked, and of what counts as right."""
    digest = hashlib.sha256(json.dumps([task.kind, task.verifier, task.method, task.by_byte]).encode())
    for item in task.items:
        digest.update(json.dumps([asdict(item.prompt), item.parallel, item.candidates, item.answer]).encode())
    return digest.hexdigest()


def _plan(
    prompts: Sequence[Prompt], mode: Mode | None = None, slots: Sequence[int] | None = None
) -> list[RoutedPrompt]:
    return [
        _routed(prompt, None if mode is None else mode.thinking(prompt), slot)
        for prompt, slot in zip(prompts, slots or [0] * len(prompts), strict=True)
    ]


def _routed(prompt: Prompt, thinking: str | None, slot: int) -> RoutedPrompt:
    return RoutedPrompt(prompt, -1, slot, prompt.language, ORIGIN_FIXED, 1.0, thinking)


def _draw_seed(seed: int, routed: RoutedPrompt) -> int:
    # Without a slot for the first: so it was before there were others, and results stay comparable.
    slot = (routed.slot,) if routed.slot else ()
    return derive_seed("evaluation", seed, routed.prompt.question_id, *slot)


def _in_another_language(answer: Answer) -> bool:
    language = None if answer.score is None else answer.score.language
    return language is not None and language != answer.item.prompt.language


def _words(one: Interval) -> str:
    return f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f})"
