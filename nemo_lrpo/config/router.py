"""`router`: which language each rollout is generated in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nemo_lrpo.config.checks import ConfigError, check_choice, check_range

OWN_LANGUAGE = "question"
"""In `router.mix`, the name that stands for the question's own language."""


@dataclass
class ScheduleConfig:
    """value(s) = max(min, init * decay^s), s the number of training steps that the router has observed."""

    init: float = 1.0
    """Value at s = 0."""
    decay: float = 1.0
    """Factor per step; 1 keeps the value constant."""
    min: float = 0.0
    """The value never falls below it."""

    def check(self, key: str) -> None:
        check_range(f"{key}.decay", self.decay, above=0.0, at_most=1.0)
        check_range(f"{key}.min", self.min, at_least=0.0, at_most=self.init)
        check_range(f"{key}.init", self.init, at_least=0.0, below=math.inf)


def _temperature() -> ScheduleConfig:
    return ScheduleConfig(init=1.0, decay=0.999, min=0.3)


def _epsilon() -> ScheduleConfig:
    return ScheduleConfig(init=0.2, decay=0.995, min=0.0)


@dataclass
class RouterConfig:
    """The defaults are the published run's settings; each switch defaults to the paper's equation."""

    name: str = "published"
    """published: the learned router; monolingual: every slot in the question's language (plain GRPO); uniform: every
    language alike; fixed: the languages of `mix`, never learned."""
    reserved_slots: int = 2
    """K_on: the first slots of each group, in the question's own language."""
    fixed_topics: list[str] = field(default_factory=lambda: ["Translation"])
    """A question with one of these topics keeps its own language in every slot."""

    mix: dict[str, float] = field(default_factory=dict)
    """For name=fixed: weight per language code; the name `question` is the question's own language."""

    update_every: int = 5
    """M: the tables learn after every so many training steps, from the rollouts buffered since the last time."""
    alpha: float = 0.1
    """Share of the new value in the moving average, A <- (1 - alpha) A + alpha r."""
    normalisation: str = "zscore"
    """Of the bucket means within each (topic, region), over the languages seen there: none; center: minus their mean;
    zscore: also divided by their (population) standard deviation + 1e-6."""
    temperature: ScheduleConfig = field(default_factory=_temperature)
    """tau of the softmax."""
    epsilon: ScheduleConfig = field(default_factory=_epsilon)
    """Probability that a slot draws its language uniformly."""
    prior: dict[str, float] = field(default_factory=dict)
    """Initial mix of languages, weight per code, of topics without one of their own; empty: uniform. Languages that a
    mix leaves out get the smallest weight that it lists."""
    topic_priors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Initial mix by topic; write the weights as decimals (1.0)."""
    region_priors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Initial mix by region, likewise; regions without one start uniform."""

    region_values: str = "all"
    """all (paper): region values count for every question with a region; regional_topic (released code): they are read
    and learned only under one of `regional_topics`."""
    regional_topics: list[str] = field(default_factory=lambda: ["Regional Knowledge"])
    """The topics of region_values=regional_topic."""
    topic_update: str = "once"
    """once (paper): one moving-average step per table entry and update, towards the mean of its buckets weighted by
    their rollouts, so that r is the average reward of the entry when normalisation is none; per_cell (released
    code): one step per (topic, region, language) bucket, in the order in which the buckets were first filled."""
    teach: str = "all"
    """Rollouts that the tables learn from. all (paper): reserved and fixed ones too; drawn: those that were drawn."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless the values make a router. Names of languages, topics and regions are checked
        against the data when the router is built."""
        check_choice(f"{key}.name", self.name, ("published", "monolingual", "uniform", "fixed"))
        check_range(f"{key}.reserved_slots", self.reserved_slots, at_least=0)
        check_range(f"{key}.update_every", self.update_every, at_least=1)
        check_range(f"{key}.alpha", self.alpha, above=0.0, at_most=1.0)
        check_choice(f"{key}.normalisation", self.normalisation, ("none", "center", "zscore"))
        check_choice(f"{key}.region_values", self.region_values, ("all", "regional_topic"))
        check_choice(f"{key}.topic_update", self.topic_update, ("once", "per_cell"))
        check_choice(f"{key}.teach", self.teach, ("all", "drawn"))
        self.temperature.check(f"{key}.temperature")
        # The softmax divides by it.
        check_range(f"{key}.temperature.min", self.temperature.min, above=0.0)
        self.epsilon.check(f"{key}.epsilon")
        check_range(f"{key}.epsilon.init", self.epsilon.init, at_most=1.0)
        if self.region_values == "regional_topic" and not self.regional_topics:
            raise ConfigError(
                f"{key}.regional_topics=[] with {key}.region_values=regional_topic uses no region at all; name a topic."
            )
        if bool(self.mix) != (self.name == "fixed"):
            raise ConfigError(
                f"{key}.mix={dict(self.mix)!r} does not go with {key}.name={self.name!r}; name=fixed needs a mix, for "
                f"example {{{OWN_LANGUAGE}: 0.5, en: 0.5}}, and the other routers take none."
            )
        _check_weights(f"{key}.mix", self.mix, zero_allowed=True)
        _check_weights(f"{key}.prior", self.prior)
        for name, mixes in (("topic_priors", self.topic_priors), ("region_priors", self.region_priors)):
            for context, mix in mixes.items():
                _check_weights(f"{key}.{name}[{context!r}]", mix)
                if not mix:
                    raise ConfigError(f"{key}.{name}[{context!r}] is empty; list languages with weights, or drop it.")


def _check_weights(key: str, mix: dict[str, float], zero_allowed: bool = False) -> None:
    for language, weight in mix.items():
        if zero_allowed:
            check_range(f"{key}.{language}", weight, at_least=0.0, below=math.inf)
        else:
            # The table starts at the logarithm.
            check_range(f"{key}.{language}", weight, above=0.0, below=math.inf)
    if mix and not sum(mix.values()) > 0.0:
        raise ConfigError(f"{key}: all weights are zero; give at least one language a positive weight.")
