"""The published policy: one value table for topics and one for regions, learned by moving averages.

p(l|x) = softmax_l( (sum_t A[t, l] + sum_g B[g, l] - charge_l) / tau ), t over the topics and g over the regions of x.
In every window the average value of each (topic, region, language) bucket, normalised within its (topic, region), moves
A[t, l] and B[g, l] by an exponential moving average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.router import RouterConfig, ScheduleConfig
from nemo_lrpo.router.base import finite_array
from nemo_lrpo.router.policy import Context, Evidence

Table = NDArray[np.float64]
Index = NDArray[np.int64]


def scheduled(schedule: ScheduleConfig, step: int) -> float:
    """max(min, init * decay^step)."""
    return max(schedule.min, schedule.init * schedule.decay**step)


def prior_row(mix: Mapping[str, float], languages: Sequence[str]) -> Table:
    """float64 [L]: log of the mix's shares relative to uniform, log(p_l L), so that a uniform row is exactly zero.

    Languages that the mix leaves out get the smallest weight that it lists; an empty mix is uniform. The constant
    log L does not change p(.|x).
    """
    if not mix:
        return np.zeros(len(languages))
    weights = np.array([mix.get(language, min(mix.values())) for language in languages])
    return np.log(weights / weights.sum() * len(languages))


def normalised(means: Table, cell: Index, how: str, floor: float) -> Table:
    """Bucket means [B] on the scale that the tables learn, each within its (topic, region) `cell` [B].

    `how`: none, center (minus the cell's mean of bucket means) or zscore (also over their population standard
    deviation + floor).
    """
    if how == "none":
        return means
    count = np.maximum(np.bincount(cell), 1)
    centred = means - (np.bincount(cell, means) / count)[cell]
    if how == "center":
        return centred
    return centred / (np.sqrt(np.bincount(cell, centred**2) / count) + floor)[cell]


class PublishedPolicy:
    """LRPO's policy. Tables are float64: topic_values A [T, L], region_values B [G, L]."""

    name = "published"
    per_question = False
    per_language = False
    state_axes: Mapping[str, tuple[str, ...]] = {
        "topic_values": ("topics", "languages"),
        "region_values": ("regions", "languages"),
    }

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Contexts are declared here, from the data; later ones are unknown. Raises ConfigError, naming the key, for
        a prior of an unknown topic, region or language."""
        self._config = config
        self.languages, self.topics, self.regions = tuple(languages), tuple(topics), tuple(regions)
        for name, mixes, known in (
            ("topic_priors", config.topic_priors, self.topics),
            ("region_priors", config.region_priors, self.regions),
        ):
            for context, mix in mixes.items():
                if context not in known:
                    raise ConfigError(unknown_key_message(context, known, f"router.{name} (names are the data's)"))
                _check_languages(mix, self.languages, f"router.{name}[{context!r}]")
        _check_languages(config.prior, self.languages, "router.prior")
        self._topic_rows = {name: i for i, name in enumerate(self.topics)}
        self._region_rows = {name: i for i, name in enumerate(self.regions)}
        # Of a topic that the data did not declare.
        self._unknown_topic = prior_row(config.prior, self.languages)
        self.topic_values = self._table(config.topic_priors.get(t, config.prior) for t in self.topics)
        self.region_values = self._table(config.region_priors.get(g, {}) for g in self.regions)

    def _table(self, mixes: Iterable[Mapping[str, float]]) -> Table:
        return np.array([prior_row(mix, self.languages) for mix in mixes]).reshape(-1, len(self.languages))

    # --- drawing --------------------------------------------------------------------------------------------------

    def values(self, contexts: Sequence[Context]) -> Table:
        """float64 [C, L]: the sum of each context's rows, before the temperature.

        A topic that was not declared counts with the row of `prior`; a region that was not with none.
        """
        table = np.concatenate([self.topic_values, self._unknown_topic[None], self.region_values])
        topics, first_region = len(self.topics), len(self.topics) + 1
        owner: list[int] = []
        rows: list[int] = []
        for index, context in enumerate(contexts):
            found = [self._topic_rows.get(topic, topics) for topic in context.topics]
            if self._uses_region(context.topics):
                found += [first_region + self._region_rows[g] for g in context.regions if g in self._region_rows]
            owner += [index] * len(found)
            rows += found
        total = np.zeros((len(contexts), len(self.languages)))
        np.add.at(total, owner, table[rows])
        return total

    def probabilities(
        self, contexts: Sequence[Context], step: int, charges: NDArray[np.float64] | None = None
    ) -> Table:
        """See LanguagePolicy; tau is that of `step`."""
        scaled = self.values(contexts)
        if charges is not None:
            scaled -= charges
        scaled /= scheduled(self._config.temperature, step)
        scaled -= scaled.max(axis=1, keepdims=True)
        weights = np.exp(scaled)
        return weights / weights.sum(axis=1, keepdims=True)

    def _uses_region(self, topics: Iterable[str]) -> bool:
        return self._config.region_values == "all" or bool(set(topics) & set(self._config.regional_topics))

    # --- learning -------------------------------------------------------------------------------------------------

    def learn(self, evidence: Evidence) -> None:
        """Move the tables towards the window's rewards. A rollout with several topics or regions counts in each of
        their buckets; topics and regions that were not declared are left out."""
        cells, rows, cell_of = self._cells(evidence)
        if not len(rows):
            return
        size = len(self.languages)
        at = cell_of * size + evidence.language[rows]
        bucket, first, inverse = np.unique(at, return_index=True, return_inverse=True)
        count = np.bincount(inverse)
        means = np.bincount(inverse, evidence.value[rows]) / count
        cell, language = bucket // size, bucket % size
        values = normalised(means, cell, self._config.normalisation, self._config.zscore_floor)
        topic, region = np.array(cells, np.int64).reshape(-1, 2).T
        regional = (region >= 0) & np.array([self._uses_region([self.topics[t]]) for t in topic.tolist()], bool)
        entries = [(self.topic_values, topic, np.full(len(cells), True)), (self.region_values, region, regional)]
        for table, row, used in entries:
            picked = np.argsort(first)
            picked = picked[used[cell[picked]]]
            self._move(table, row[cell[picked]], language[picked], values[picked], count[picked])

    def _cells(self, evidence: Evidence) -> tuple[list[tuple[int, int]], Index, Index]:
        """(topic row, region row or -1) of each cell; then, per pair of a rollout and one of its cells: both [P]."""
        cells: dict[tuple[int, int], int] = {}
        of_context = []
        for context in evidence.contexts:
            topics = [self._topic_rows[t] for t in context.topics if t in self._topic_rows]
            regions = [self._region_rows[g] for g in context.regions if g in self._region_rows]
            of_context.append([cells.setdefault(pair, len(cells)) for pair in product(topics, regions or [-1])])
        widths = np.array([len(found) for found in of_context], np.int64)
        flat = np.array([cell for found in of_context for cell in found], np.int64)
        starts = np.cumsum(widths) - widths
        repeats = widths[evidence.context] if len(widths) else np.zeros(0, np.int64)
        rows = np.repeat(np.arange(len(evidence.context)), repeats)
        position = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return list(cells), rows, flat[starts[evidence.context[rows]] + position] if len(rows) else rows

    def _move(self, table: Table, row: Index, language: Index, value: Table, count: Index) -> None:
        """Moving averages of entries [B] of `table`, in the order in which the buckets were first filled."""
        alpha = self._config.alpha
        if self._config.topic_update == "per_cell":
            for entry in zip(row.tolist(), language.tolist(), value.tolist()):
                table[entry[:2]] = (1.0 - alpha) * table[entry[:2]] + alpha * entry[2]
            return
        at = row * table.shape[1] + language
        rollouts = np.bincount(at, count, table.size).reshape(table.shape)
        total = np.bincount(at, value * count, table.size).reshape(table.shape)
        seen = rollouts > 0
        table[seen] = (1.0 - alpha) * table[seen] + alpha * (total[seen] / rollouts[seen])

    # --- state and log --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See LanguagePolicy."""
        return {"topic_values": self.topic_values.copy(), "region_values": self.region_values.copy()}

    def load(self, state: Mapping[str, Any]) -> None:
        """See LanguagePolicy."""
        loaded = [
            finite_array(state, "topic_values", self.topic_values.shape),
            finite_array(state, "region_values", self.region_values.shape),
        ]
        self.topic_values, self.region_values = loaded

    def metrics(self, step: int) -> dict[str, float]:
        """See LanguagePolicy."""
        return {"temperature": scheduled(self._config.temperature, step)}


def _check_languages(mix: Mapping[str, float], languages: Sequence[str], key: str) -> None:
    for language in mix:
        if language not in languages:
            raise ConfigError(unknown_key_message(language, languages, f"{key} (names are candidate languages)"))
