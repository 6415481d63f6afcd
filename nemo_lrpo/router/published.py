"""The published router: a contextual bandit over languages with one value table for topics and one for regions.

p(l|x) = softmax_l( (sum_t A[t, l] + sum_g B[g, l]) / tau ), t over the topics and g over the regions of x; a slot is
drawn from epsilon/L + (1 - epsilon) p. Every M training steps the average reward of each (topic, region, language)
bucket, normalised within its (topic, region), moves A[t, l] and B[g, l] by an exponential moving average.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.router import RouterConfig, ScheduleConfig
from nemo_lrpo.router.base import Probabilities, RouterStateError
from nemo_lrpo.router.slots import SlotRouter, whole_number
from nemo_lrpo.types import ORIGIN_DRAWN, Observation, Prompt

Table = NDArray[np.float64]
Bucket = tuple[str, "str | None", str]
"""(topic, region or None, language)."""

_ZSCORE_EPS = 1e-6


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


def normalise(means: NDArray[np.float64], how: str) -> NDArray[np.float64]:
    """Bucket means of one (topic, region), [languages seen there], on the scale that the tables learn.

    `how`: none, center (minus their mean) or zscore (also over their population standard deviation + 1e-6).
    """
    if how == "none":
        return means
    centred = means - means.mean()
    return centred if how == "center" else centred / (means.std() + _ZSCORE_EPS)


class PublishedRouter(SlotRouter):
    """LRPO's router. Tables are float64: topic_values A [T, L], region_values B [G, L]."""

    def __init__(
        self,
        config: RouterConfig,
        languages: Sequence[str],
        topics: Sequence[str],
        regions: Sequence[str],
        seed: int,
    ) -> None:
        """Contexts are declared here, from the data; later ones are unknown. Raises ConfigError, naming the key, for
        a prior of an unknown topic, region or language."""
        super().__init__(config, languages, seed)
        self.topics, self.regions = tuple(dict.fromkeys(topics)), tuple(dict.fromkeys(regions))
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
        # Bucket -> (sum of rewards, rollouts); the order of first entry is that of the per_cell update.
        self._pending: dict[Bucket, tuple[float, int]] = {}
        self._pending_steps = 0
        self._updates = 0
        self._unknown_contexts = 0

    def _table(self, mixes: Iterable[Mapping[str, float]]) -> Table:
        return np.array([prior_row(mix, self.languages) for mix in mixes]).reshape(-1, len(self.languages))

    # --- drawing --------------------------------------------------------------------------------------------------

    @property
    def temperature(self) -> float:
        """tau at the router's step."""
        return scheduled(self._config.temperature, self._step)

    @property
    def epsilon(self) -> float:
        """epsilon at the router's step."""
        return scheduled(self._config.epsilon, self._step)

    def logits(self, topics: Iterable[str], regions: Iterable[str]) -> Table:
        """float64 [L]: the sum of the context's rows, before the temperature.

        One named twice counts once; one that was not declared counts with its initial row (that of `prior`, or zeros)
        and gets none.
        """
        topics = tuple(topics)
        total = np.zeros(len(self.languages))
        for topic in dict.fromkeys(topics):
            row = self._topic_rows.get(topic)
            total += self._unknown_topic if row is None else self.topic_values[row]
        if self._uses_region(topics):
            for region in dict.fromkeys(regions):
                if region in self._region_rows:
                    total += self.region_values[self._region_rows[region]]
        return total

    def _policy_probabilities(self, prompt: Prompt) -> Probabilities:
        scaled = self.logits(prompt.topics, prompt.regions) / self.temperature
        weights = np.exp(scaled - scaled.max())
        return weights / weights.sum()

    def _context(self, prompt: Prompt) -> Hashable:
        return prompt.topics, prompt.regions

    def _uses_region(self, topics: Iterable[str]) -> bool:
        return self._config.region_values == "all" or bool(set(topics) & set(self._config.regional_topics))

    # --- learning -------------------------------------------------------------------------------------------------

    def _learn(self, observations: Sequence[Observation]) -> None:
        for o in observations:
            topics = [t for t in dict.fromkeys(o.topics) if t in self._topic_rows]
            regions = [g for g in dict.fromkeys(o.regions) if g in self._region_rows]
            self._unknown_contexts += len(set(o.topics)) - len(topics) + len(set(o.regions)) - len(regions)
            if self._config.teach == "drawn" and o.origin != ORIGIN_DRAWN:
                continue
            # A rollout with several topics or regions counts in each of their buckets.
            for topic, region in product(topics, regions or [None]):
                bucket = (topic, region, o.language)
                total, count = self._pending.get(bucket, (0.0, 0))
                self._pending[bucket] = (total + float(o.reward), count + 1)
        self._pending_steps += 1
        if self._pending_steps >= self._config.update_every:
            self._update()

    def _update(self) -> None:
        """Move the tables towards the buffered rewards and empty the buffer."""
        alpha, tables = self._config.alpha, (self.topic_values, self.region_values)
        values = self._bucket_values()
        if self._config.topic_update == "per_cell":
            for bucket, value in values.items():
                for which, entry in self._entries(bucket):
                    tables[which][entry] = (1.0 - alpha) * tables[which][entry] + alpha * value
        else:
            sums, counts = ([np.zeros_like(table) for table in tables] for _ in range(2))
            for bucket, value in values.items():
                rollouts = self._pending[bucket][1]
                for which, entry in self._entries(bucket):
                    sums[which][entry] += value * rollouts
                    counts[which][entry] += rollouts
            for table, total, count in zip(tables, sums, counts):
                seen = count > 0
                table[seen] = (1.0 - alpha) * table[seen] + alpha * (total[seen] / count[seen])
        self._pending, self._pending_steps = {}, 0
        self._updates += 1

    def _bucket_values(self) -> dict[Bucket, float]:
        """Average reward per bucket, normalised within each (topic, region); in the buffer's order."""
        groups: dict[tuple[str, str | None], list[Bucket]] = {}
        for bucket in self._pending:
            groups.setdefault(bucket[:2], []).append(bucket)
        values = dict.fromkeys(self._pending, 0.0)
        for buckets in groups.values():
            means = np.array([self._pending[b][0] / self._pending[b][1] for b in buckets])
            values.update(zip(buckets, normalise(means, self._config.normalisation).tolist()))
        return values

    def _entries(self, bucket: Bucket) -> list[tuple[int, tuple[int, int]]]:
        """The table entries that a bucket teaches: table (0 topics, 1 regions) and (row, column)."""
        topic, region, language = bucket
        column = self._index[language]
        entries = [(0, (self._topic_rows[topic], column))]
        if region is not None and self._uses_region([topic]):
            entries.append((1, (self._region_rows[region], column)))
        return entries

    # --- state and log --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "topics": list(self.topics), "regions": list(self.regions)}

    def state_dict(self) -> dict[str, Any]:
        """See LanguageRouter. `pending` holds [topic, region, language, sum of rewards, rollouts] per bucket."""
        return {
            **super().state_dict(),
            "updates": self._updates,
            "unknown_contexts": self._unknown_contexts,
            "topic_values": self.topic_values.tolist(),
            "region_values": self.region_values.tolist(),
            "pending_steps": self._pending_steps,
            "pending": [[*bucket, total, count] for bucket, (total, count) in self._pending.items()],
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        tables = [
            _table_of(state, "topic_values", self.topic_values.shape),
            _table_of(state, "region_values", self.region_values.shape),
        ]
        counters = [whole_number(state, part) for part in ("pending_steps", "updates", "unknown_contexts")]
        pending: dict[Bucket, tuple[float, int]] = {}
        try:
            for topic, region, language, total, count in state["pending"]:
                known = topic in self._topic_rows and language in self._index
                if (
                    not known
                    or not (region is None or region in self._region_rows)
                    or count < 1
                    or not math.isfinite(total)
                ):
                    raise ValueError(f"no such bucket: {[topic, region, language, total, count]!r}")
                pending[topic, region, language] = (float(total), int(count))
        except (KeyError, TypeError, ValueError) as error:
            raise RouterStateError(f"router state: 'pending' is missing or damaged ({error}).") from error
        self.topic_values, self.region_values = tables
        self._pending_steps, self._updates, self._unknown_contexts = counters
        self._pending = pending

    def metrics(self) -> dict[str, float]:
        """See LanguageRouter; `value/<topic>/<language>` are the topic table's entries."""
        values = super().metrics() | {
            "temperature": self.temperature,
            "updates": float(self._updates),
            "pending_steps": float(self._pending_steps),
            "unknown_contexts": float(self._unknown_contexts),
        }
        for topic, row in zip(self.topics, self.topic_values):
            for language, value in zip(self.languages, row):
                values[f"value/{topic}/{language}"] = float(value)
        return values


def _check_languages(mix: Mapping[str, float], languages: Sequence[str], key: str) -> None:
    for language in mix:
        if language not in languages:
            raise ConfigError(unknown_key_message(language, languages, f"{key} (names are candidate languages)"))


def _table_of(state: Mapping[str, Any], part: str, shape: tuple[int, ...]) -> Table:
    try:
        table = np.asarray(state[part], dtype=np.float64).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise RouterStateError(f"router state: {part!r} is missing or not a {shape} table of numbers.") from error
    if not np.isfinite(table).all():
        raise RouterStateError(f"router state: {part!r} holds values that are not finite.")
    return table
