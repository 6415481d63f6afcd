"""`router`: which language each rollout is generated in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_range

OWN_LANGUAGE = "question"
"""In `router.mix`, the name that stands for the question's own language."""
EVERY_LANGUAGE = "uniform"
"""In `router.mix`, the name whose weight is spread evenly over all languages."""
LEARNED = ("published", "ucb", "thompson", "hierarchical", "features")
"""Values of `router.name` that learn."""
FIXED = ("monolingual", "uniform", "fixed")
"""Values of `router.name` that do not."""
_READ_BY_ONE = {
    **{name: name for name in ("ucb", "thompson", "hierarchical", "features")},
    **dict.fromkeys(
        (
            *("alpha", "normalisation", "zscore_floor", "temperature", "prior", "topic_priors", "region_priors"),
            *("region_values", "regional_topics", "topic_update"),
        ),
        "published",
    ),
}
"""Settings that one router alone reads -> its name."""


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


@dataclass
class ObjectiveConfig:
    """What a rollout is worth to the router; formulas in nemo_lrpo/router/objective.py."""

    name: str = "reward"
    """reward (published): r; advantage: |r - mean| / (std + 1e-6) within the group; variance: (r - mean)^2 within the
    group; progress: r minus the slow mean of the reward in that (topics, regions) and language."""
    rate: float = 0.02
    """Of progress: share of a step's mean in the slow mean, m <- (1 - rate) m + rate r."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.name", self.name, ("reward", "advantage", "variance", "progress"))
        check_range(f"{key}.rate", self.rate, above=0.0, at_most=1.0)


@dataclass
class DiversityConfig:
    """Languages of a group besides what the policy would draw. Reserved slots count as the group's languages."""

    min_languages: int = 1
    """At least so many different languages in a group where its drawn slots allow it: the last ones draw among
    languages that the group lacks, where else fewer would come together."""
    max_per_language: int = 0
    """At most so many slots of a group are drawn into one language, reserved ones counted; 0: no limit."""
    without_replacement: bool = False
    """Every slot draws among the languages that the group has least often."""

    def check(self, key: str) -> None:
        check_range(f"{key}.min_languages", self.min_languages, at_least=1)
        check_range(f"{key}.max_per_language", self.max_per_language, at_least=0)


@dataclass
class PriceConfig:
    """What answers cost as a price: the policy chooses by value - price * (mean cost of the language / mean over the
    languages)."""

    unit: str = "tokens"
    """tokens: of the response; seconds: of generating, the time of a batch shared out among its rollouts by their
    response tokens, every data parallel rank's own. Measured, so that such a run does not repeat exactly."""
    weight: float = 0.0
    """The price of an average rollout, in units of what the policy learns: of the objective, or for name=published of
    its `normalisation` (of standard deviations under zscore). With a budget, the price to start from. 0 without one:
    off."""
    budget: Optional[float] = None
    """What a step may cost on average, in `unit`; the price then rises and falls to meet it. null: no limit."""
    rate: float = 0.05
    """Of the price's steps towards the budget: price <- max(0, price + rate (cost / budget - 1))."""
    memory: float = 0.9
    """Share that a step leaves of the running costs per language."""

    @property
    def active(self) -> bool:
        return self.weight > 0.0 or self.budget is not None

    def check(self, key: str) -> None:
        check_choice(f"{key}.unit", self.unit, ("tokens", "seconds"))
        check_range(f"{key}.weight", self.weight, at_least=0.0, below=math.inf)
        if self.budget is not None:
            check_range(f"{key}.budget", self.budget, above=0.0, below=math.inf)
        check_range(f"{key}.rate", self.rate, above=0.0, at_most=1.0)
        check_range(f"{key}.memory", self.memory, at_least=0.0, below=1.0)


@dataclass
class RolloutsConfig:
    """Rollouts per question within the step's total of prompts_per_step * rollouts_per_prompt."""

    adaptive: bool = False
    """True: in proportion to the standard deviation that the group's rewards had in that context so far."""
    min: int = 4
    """Of a group, where adaptive."""
    max: int = 16
    """Of a group, where adaptive."""
    memory: float = 0.9
    """Share that a step leaves of the running means."""

    def check(self, key: str) -> None:
        check_range(f"{key}.min", self.min, at_least=1)
        check_range(f"{key}.max", self.max, at_least=self.min)
        check_range(f"{key}.memory", self.memory, at_least=0.0, below=1.0)


@dataclass
class UcbConfig:
    """Of name=ucb."""

    exploration: float = 0.5
    """Weight of the confidence bonus, in standard deviations of a rollout."""
    discount: float = 0.99
    """Share of what was learned that a training step leaves."""

    def check(self, key: str) -> None:
        check_range(f"{key}.exploration", self.exploration, at_least=0.0, below=math.inf)
        check_range(f"{key}.discount", self.discount, above=0.0, at_most=1.0)


@dataclass
class ThompsonConfig:
    """Of name=thompson."""

    discount: float = 0.99
    """Share of what was learned that a training step leaves."""
    sharpness: float = 1.0
    """Power of the probability to be best; 1 is Thompson sampling."""

    def check(self, key: str) -> None:
        check_range(f"{key}.discount", self.discount, above=0.0, at_most=1.0)
        check_range(f"{key}.sharpness", self.sharpness, above=0.0, below=math.inf)


@dataclass
class HierarchicalConfig:
    """Of name=hierarchical."""

    memory: list[float] = field(default_factory=lambda: [1.0, 0.97, 0.85, 0.5])
    """Shares of what was learned that a training step leaves, one model each; the data weights them."""
    sharpness: float = 4.0
    """Power of the probability to be best; 1 is Thompson sampling."""

    def check(self, key: str) -> None:
        _check_memory(f"{key}.memory", self.memory)
        check_range(f"{key}.sharpness", self.sharpness, above=0.0, below=math.inf)


@dataclass
class FeaturesConfig:
    """Of name=features."""

    dimension: int = 256
    """Length D of the hashed feature vector; languages * D^2 numbers are kept per memory. Shortened where they would be
    more than 2^21: 256 fits 32 languages, 204 are left for 50, 64 for 500."""
    memory: list[float] = field(default_factory=lambda: [1.0, 0.9])
    """Shares of what was learned that a training step leaves, one model each; the data weights them."""
    sharpness: float = 4.0
    """Power of the probability to be best; 1 is Thompson sampling."""

    def check(self, key: str) -> None:
        check_range(f"{key}.dimension", self.dimension, at_least=8)
        _check_memory(f"{key}.memory", self.memory)
        check_range(f"{key}.sharpness", self.sharpness, above=0.0, below=math.inf)


def _temperature() -> ScheduleConfig:
    return ScheduleConfig(init=1.0, decay=0.999, min=0.3)


def _epsilon() -> ScheduleConfig:
    return ScheduleConfig(init=0.2, decay=0.995, min=0.0)


@dataclass
class RouterConfig:
    """The defaults are the published run's settings; each switch defaults to the paper's equation."""

    name: str = "published"
    """published: the paper's softmax of moving averages; ucb, thompson, hierarchical, features: the other learners;
    monolingual: every slot in the question's language (plain GRPO); uniform: every language alike; fixed: the languages
    of `mix`, never learned."""
    reserved_slots: int = 2
    """K_on: the first slots of each group, in the question's own language."""
    fixed_topics: list[str] = field(default_factory=lambda: ["Translation"])
    """A question with one of these topics keeps its own language in every slot."""

    mix: dict[str, float] = field(default_factory=dict)
    """For name=fixed: weight per language code; the name `question` is the question's own language, and the weight of
    `uniform` is spread evenly over all languages."""

    update_every: int = 5
    """M: the policy learns after every so many training steps, from the rollouts buffered since the last time."""
    teach: str = "all"
    """Rollouts that the policy learns from. all (paper): reserved and fixed ones too; drawn: those that were drawn."""
    epsilon: ScheduleConfig = field(default_factory=_epsilon)
    """Probability that a slot of a learned router draws its language uniformly."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    price: PriceConfig = field(default_factory=PriceConfig)
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)

    # Of name=published:
    alpha: float = 0.1
    """Share of the new value in the moving average, A <- (1 - alpha) A + alpha r."""
    normalisation: str = "zscore"
    """Of the bucket means within each (topic, region), over the languages seen there: none; center: minus their mean;
    zscore: also divided by their (population) standard deviation + `zscore_floor`."""
    zscore_floor: float = 1e-6
    """The published value makes +1 and -1 of any difference between two languages, were it 1e-4; about the noise of a
    bucket's mean (0.05) leaves small differences small."""
    temperature: ScheduleConfig = field(default_factory=_temperature)
    """tau of the softmax."""
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

    ucb: UcbConfig = field(default_factory=UcbConfig)
    thompson: ThompsonConfig = field(default_factory=ThompsonConfig)
    hierarchical: HierarchicalConfig = field(default_factory=HierarchicalConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def check(self, key: str) -> None:
        """Raise ConfigError unless the values make a router. Names of languages, topics and regions are checked
        against the data when the router is built."""
        check_choice(f"{key}.name", self.name, LEARNED + FIXED)
        check_range(f"{key}.reserved_slots", self.reserved_slots, at_least=0)
        check_range(f"{key}.update_every", self.update_every, at_least=1)
        check_range(f"{key}.alpha", self.alpha, above=0.0, at_most=1.0)
        check_choice(f"{key}.normalisation", self.normalisation, ("none", "center", "zscore"))
        check_range(f"{key}.zscore_floor", self.zscore_floor, above=0.0, below=math.inf)
        check_choice(f"{key}.region_values", self.region_values, ("all", "regional_topic"))
        check_choice(f"{key}.topic_update", self.topic_update, ("once", "per_cell"))
        check_choice(f"{key}.teach", self.teach, ("all", "drawn"))
        self.temperature.check(f"{key}.temperature")
        # The softmax divides by it.
        check_range(f"{key}.temperature.min", self.temperature.min, above=0.0)
        self.epsilon.check(f"{key}.epsilon")
        check_range(f"{key}.epsilon.init", self.epsilon.init, at_most=1.0)
        for name in ("objective", "diversity", "price", "rollouts", "ucb", "thompson", "hierarchical", "features"):
            getattr(self, name).check(f"{key}.{name}")
        self._check_fixed(key)
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

    def check_read(self, key: str) -> None:
        """Raise ConfigError where a setting was changed that only another router reads: it would do nothing."""
        defaults = RouterConfig()
        for name, owner in _READ_BY_ONE.items():
            changed = _changes(f"{key}.{name}", getattr(self, name), getattr(defaults, name))
            if changed and owner != self.name:
                where, value, default = changed[0]
                raise ConfigError(
                    f"{where}={value!r} does nothing: {key}.name={owner!r} alone reads it, and this run has "
                    f"{self.name!r}. Leave it at {default!r}, or choose router={owner}."
                )

    def _check_fixed(self, key: str) -> None:
        """What a router that does not learn cannot do."""
        if self.name in FIXED and self.price.active:
            raise ConfigError(
                f"{key}.price does not go with {key}.name={self.name!r}, which draws from a given mix; accepted with a "
                f"price: {', '.join(LEARNED)}."
            )
        if self.name == "monolingual" and self.diversity != DiversityConfig():
            raise ConfigError(
                f"{key}.diversity does not go with {key}.name='monolingual', which has one language per group; leave "
                "it at its defaults."
            )


def _changes(key: str, value: object, default: object) -> list[tuple[str, object, object]]:
    """Key, value and default of what differs, part by part of a section."""
    if not is_dataclass(value):
        return [(key, value, default)] if value != default else []
    parts = [(f"{key}.{f.name}", getattr(value, f.name), getattr(default, f.name)) for f in fields(value)]
    return [change for part in parts for change in _changes(*part)]


def _check_memory(key: str, memory: list[float]) -> None:
    if not memory:
        raise ConfigError(f"{key}=[] leaves no model; give shares above 0 and at most 1, such as [1.0, 0.9].")
    for i, share in enumerate(memory):
        check_range(f"{key}[{i}]", share, above=0.0, at_most=1.0)


def _check_weights(key: str, mix: dict[str, float], zero_allowed: bool = False) -> None:
    for language, weight in mix.items():
        if zero_allowed:
            check_range(f"{key}.{language}", weight, at_least=0.0, below=math.inf)
        else:
            # The table starts at the logarithm.
            check_range(f"{key}.{language}", weight, above=0.0, below=math.inf)
    if mix and not sum(mix.values()) > 0.0:
        raise ConfigError(f"{key}: all weights are zero; give at least one language a positive weight.")
