"""Preference pairs from a run's rollouts, for off-line baselines on the very answers that GRPO learned from.

Three ways to pair; a group is the answers to one question in one language, whatever steps they are of:

- `best_and_worst`, plain DPO: of each group the answer with the highest reward against that with the lowest.
- `by_alignment`, MAPO-like (She et al., 2024): in each language but the dominant one, answers are ranked by how near
  they lie to the dominant language's answers to the same question, and each is preferred to all below it, if its own
  reward is high enough. Published: nearness is a translation model's mean probability of the dominant answers, and a
  preferred answer has to be correct. Here nearness is what the caller measures (`alignments_wanted` says of which
  answers), as a rule the encoder's cosine (calibration maps all of a pair of languages alike and leaves a ranking), and
  correct is a reward of `min_reward`. Rewards are gated, so that an answer in the dominant language itself, nearest of
  all, is not preferred.
- `with_dominant_gap`, MPO-like (Zhao et al., 2025): the pairs of `best_and_worst` in each language but the dominant
  one, with the dominant language's pair of the same question, whose log-prob gap is their target
  (nemo_lrpo.algorithms.preference.reward_gap_loss). Published: both pairs are translations of each other; here both
  are the policy's own answers.

All are functions of the answers as a set: their order in the file does not matter. Every answer is in a pair or is left
out with a reason, never both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.rows import Row, json_lines, kind_of

UNFINISHED = "unfinished"
"""The answer did not end within its budget; such answers do not train in GRPO either."""
FORCED = "forced"
"""Of mode=explang: the answer was made to think in a language. Its line lacks the tag, which the policy has not
written, and a pair of it would begin behind the tag."""
NO_REWARD = "no_reward"
"""The reward was masked or never came."""
NO_ALIGNMENT = "no_alignment"
"""Nobody measured how near the answer lies to those of the dominant language."""
SINGLE = "single"
"""Nothing to compare with: no other answer of the group can be used."""
TIE = "tie"
"""No two answers of the group differ by more than the margin."""
BETWEEN = "between"
"""Neither the best nor the worst of its group."""
NOT_PREFERRED = "not_preferred"
"""Of an aligned ranking: no answer above it may be preferred, nor it to one below."""
NO_DOMINANT = "no_dominant"
"""The question has no answer, or pair, in the dominant language."""
DOMINANT = "dominant"
"""An answer in the dominant language, where only the others are paired."""
REASONS = (UNFINISHED, FORCED, NO_REWARD, NO_ALIGNMENT, SINGLE, TIE, BETWEEN, NOT_PREFERRED, NO_DOMINANT, DOMINANT)


@dataclass(frozen=True)
class RatedAnswer:
    """One line of rollouts.jsonl. `language` is the requested one; reward: in [0, 1], None where there is none. forced:
    the response goes on behind a tag that was prefilled."""

    sample_id: str
    question_id: str
    question: str
    question_language: str
    language: str
    response: str
    reward: float | None
    ended: bool
    forced: bool = False


@dataclass(frozen=True)
class PreferencePair:
    """`chosen` is preferred to `rejected`, both to one question in one language.

    margin: how far they lie apart, above 0: in reward, or in alignment (MAPO-like). dominant: the pair of the dominant
    language to the same question, MPO-like only.
    """

    chosen: RatedAnswer
    rejected: RatedAnswer
    margin: float
    dominant: PreferencePair | None = None

    @property
    def pair_id(self) -> str:
        """The ids of both answers."""
        return f"{self.chosen.sample_id} > {self.rejected.sample_id}"


@dataclass(frozen=True)
class Pairing:
    """pairs: by question id, then language, then margin, the widest first. left_out: reason by sample id, of every
    answer that is in no pair, neither as itself nor as the dominant language's."""

    pairs: tuple[PreferencePair, ...]
    left_out: Mapping[str, str]


Groups = dict[tuple[str, str], list[RatedAnswer]]
"""By question id and language."""


def read_answers(path: Path) -> Iterator[RatedAnswer]:
    """The answers of a rollouts.jsonl. Raises DataError naming file, line and key at the first bad row, and for a
    sample id that occurs twice."""
    seen: dict[str, str] = {}
    for where, fields in json_lines(path):
        answer = _answer(Row(where, fields))
        if answer.sample_id in seen:
            raise DataError(f"{where}: sample_id={answer.sample_id!r} occurred before, in {seen[answer.sample_id]}.")
        seen[answer.sample_id] = where
        yield answer


def best_and_worst(answers: Iterable[RatedAnswer], min_margin: float = 0.0) -> Pairing:
    """Plain DPO's pairs; see the module. Their rewards differ by more than min_margin.

    Among equals the answer of the earliest step and slot counts. Raises ValueError for a negative margin and a sample
    id that occurs twice.
    """
    usable, left_out = _usable(answers, min_margin)
    pairs = _extremes(_grouped(usable), min_margin, left_out)
    return _pairing(pairs, left_out)


def with_dominant_gap(answers: Iterable[RatedAnswer], dominant: str, min_margin: float = 0.0) -> Pairing:
    """MPO-like pairs; see the module. dominant: ISO 639-1 code. Raises ValueError as `best_and_worst`."""
    usable, left_out = _usable(answers, min_margin)
    found = {
        (pair.chosen.question_id, pair.chosen.language): pair
        for pair in _extremes(_grouped(usable), min_margin, left_out)
    }
    pairs, wanted = [], set()
    for (question, language), pair in found.items():
        if language == dominant:
            continue
        target = found.get((question, dominant))
        if target is None:
            _leave(left_out, (pair.chosen, pair.rejected), NO_DOMINANT)
        else:
            pairs.append(PreferencePair(pair.chosen, pair.rejected, pair.margin, target))
            wanted.add(question)
    for (question, language), pair in found.items():
        if language == dominant and question not in wanted:
            _leave(left_out, (pair.chosen, pair.rejected), DOMINANT)
    return _pairing(pairs, left_out)


def alignments_wanted(
    answers: Iterable[RatedAnswer], dominant: str, min_reward: float = 0.5
) -> list[tuple[RatedAnswer, RatedAnswer]]:
    """(answer, dominant answer) of which `by_alignment` wants to know how near they lie, in the order of sample ids.

    The dominant language's answers that count are those that ended with a reward of at least min_reward, each text
    once; wanted for every answer in another language to the same question that ended.
    """
    usable, _ = _usable(answers, 0.0)
    groups = _grouped(usable)
    anchors = _anchors(groups, dominant, min_reward)
    return [
        (answer, anchor)
        for (question, language), group in sorted(groups.items())
        if language != dominant
        for answer in group
        for anchor in anchors.get(question, [])
    ]


def by_alignment(
    answers: Iterable[RatedAnswer],
    dominant: str,
    alignments: Mapping[tuple[str, str], float],
    min_reward: float = 0.5,
    min_margin: float = 0.0,
) -> Pairing:
    """MAPO-like pairs; see the module.

    alignments: nearness by the sample ids of `alignments_wanted`, higher is nearer; an answer's own is their mean over
    the dominant answers, and it is left out if one of them is missing or not finite. min_reward: of an answer that is
    preferred. Alignments of a pair differ by more than min_margin, and so do its texts. Raises ValueError as
    `best_and_worst`.
    """
    usable, left_out = _usable(answers, min_margin)
    groups = _grouped(usable)
    anchors = _anchors(groups, dominant, min_reward)
    pairs: list[PreferencePair] = []
    for (question, language), group in groups.items():
        if language == dominant:
            _leave(left_out, group, DOMINANT)
        elif question not in anchors:
            _leave(left_out, group, NO_DOMINANT)
        else:
            near = {answer.sample_id: _mean_alignment(answer, anchors[question], alignments) for answer in group}
            pairs += _ranked(group, near, min_reward, min_margin, left_out)
    return _pairing(pairs, left_out)


# -- steps of the above ----------------------------------------------------------------------------------------------


def _answer(row: Row) -> RatedAnswer:
    sample_id = row.required_text("sample_id")
    step, _, rest = sample_id.partition("/")
    question_id, _, slot = rest.rpartition("/")
    if not (_is_number(step) and question_id and _is_number(slot)):
        row.refuse("sample_id", f"is {sample_id!r}; accepted: STEP/QUESTION/SLOT, as a run writes it")
    response, ended = row.required("response"), row.required("ended")
    if not isinstance(response, str):
        row.refuse("response", f"is {kind_of(response)}; accepted: text")
    if response.strip():
        row.text("response", response)
    if not isinstance(ended, bool):
        row.refuse("ended", f"is {kind_of(ended)}; accepted: true or false")
    reward = row.get("score.reward")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, (int, float))):
        row.refuse("score.reward", f"is {kind_of(reward)}; accepted: a number or null")
    if reward is not None and not math.isfinite(reward):
        row.refuse("score.reward", f"is {reward}; accepted: a finite number or null")
    return RatedAnswer(
        sample_id=sample_id,
        question_id=question_id,
        question=row.required_text("question"),
        question_language=row.required_text("question_language"),
        language=row.required_text("language"),
        response=response,
        reward=None if reward is None else float(reward),
        ended=ended,
        forced=row.get("thinking") is not None,
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _order(answer: RatedAnswer) -> tuple[int, int, str]:
    """Step and slot as numbers: 10 comes after 9."""
    step, slot = answer.sample_id.split("/", 1)[0], answer.sample_id.rsplit("/", 1)[-1]
    return int(step), int(slot), answer.sample_id


def _usable(answers: Iterable[RatedAnswer], min_margin: float) -> tuple[list[RatedAnswer], dict[str, str]]:
    """Those that ended, were not forced and have a reward, by step and slot; the others with their reasons."""
    if not min_margin >= 0.0:
        raise ValueError(f"min_margin={min_margin} is out of range; it must be >= 0.")
    usable, left_out, seen = [], {}, set()
    for answer in answers:
        if answer.sample_id in seen:
            raise ValueError(f"sample_id={answer.sample_id!r} occurs twice; answers are joined by it.")
        seen.add(answer.sample_id)
        if not answer.ended:
            left_out[answer.sample_id] = UNFINISHED
        elif answer.forced:
            left_out[answer.sample_id] = FORCED
        elif answer.reward is None:
            left_out[answer.sample_id] = NO_REWARD
        else:
            usable.append(answer)
    return sorted(usable, key=_order), left_out


def _grouped(answers: Sequence[RatedAnswer]) -> Groups:
    groups: Groups = defaultdict(list)
    for answer in answers:
        groups[answer.question_id, answer.language].append(answer)
    return dict(groups)


def _extremes(groups: Groups, min_margin: float, left_out: dict[str, str]) -> list[PreferencePair]:
    pairs = []
    for group in groups.values():
        # max and min keep the first of equals.
        best, worst = max(group, key=_reward), min(group, key=_reward)
        margin = _reward(best) - _reward(worst)
        if len(group) == 1:
            _leave(left_out, group, SINGLE)
        elif not margin > min_margin or best.response == worst.response:
            _leave(left_out, group, TIE)
        else:
            pairs.append(PreferencePair(best, worst, margin))
            _leave(left_out, [answer for answer in group if answer is not best and answer is not worst], BETWEEN)
    return pairs


def _reward(answer: RatedAnswer) -> float:
    assert answer.reward is not None
    return answer.reward


def _anchors(groups: Groups, dominant: str, min_reward: float) -> dict[str, list[RatedAnswer]]:
    """By question id: good answers in the dominant language, each text once."""
    anchors: dict[str, list[RatedAnswer]] = {}
    for (question, language), group in groups.items():
        if language == dominant:
            texts = {answer.response: answer for answer in reversed(group) if _reward(answer) >= min_reward}
            if texts:
                anchors[question] = sorted(texts.values(), key=_order)
    return anchors


def _mean_alignment(
    answer: RatedAnswer, anchors: Sequence[RatedAnswer], alignments: Mapping[tuple[str, str], float]
) -> float:
    """NaN where one is missing."""
    values = [alignments.get((answer.sample_id, anchor.sample_id), math.nan) for anchor in anchors]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.nan


def _ranked(
    group: Sequence[RatedAnswer],
    near: Mapping[str, float],
    min_reward: float,
    min_margin: float,
    left_out: dict[str, str],
) -> list[PreferencePair]:
    measured = [answer for answer in group if not math.isnan(near[answer.sample_id])]
    _leave(left_out, [answer for answer in group if math.isnan(near[answer.sample_id])], NO_ALIGNMENT)
    if len(measured) == 1:
        _leave(left_out, measured, SINGLE)
        return []
    apart = [
        PreferencePair(chosen, rejected, near[chosen.sample_id] - near[rejected.sample_id])
        for chosen in measured
        for rejected in measured
        if near[chosen.sample_id] - near[rejected.sample_id] > min_margin and chosen.response != rejected.response
    ]
    pairs = [pair for pair in apart if _reward(pair.chosen) >= min_reward]
    used, differ = _ids(pairs), _ids(apart)
    for answer in measured:
        if answer.sample_id not in used:
            left_out[answer.sample_id] = NOT_PREFERRED if answer.sample_id in differ else TIE
    return pairs


def _ids(pairs: Iterable[PreferencePair]) -> set[str]:
    return {answer.sample_id for pair in pairs for answer in (pair.chosen, pair.rejected)}


def _leave(left_out: dict[str, str], answers: Collection[RatedAnswer], reason: str) -> None:
    left_out.update({answer.sample_id: reason for answer in answers})


def _pairing(pairs: Iterable[PreferencePair], left_out: Mapping[str, str]) -> Pairing:
    def key(pair: PreferencePair) -> tuple[object, ...]:
        chosen, rejected = pair.chosen, pair.rejected
        return chosen.question_id, chosen.language, -pair.margin, _order(chosen), _order(rejected)

    return Pairing(tuple(sorted(pairs, key=key)), dict(sorted(left_out.items())))
