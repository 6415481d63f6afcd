"""What all routers share: reserved and fixed slots, the epsilon mixture, counter-based draws, checks, state."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.base import Probabilities, RouterStateError
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import ORIGIN_DRAWN, ORIGIN_FIXED, ORIGIN_RESERVED, Observation, Prompt, RoutedPrompt

STATE_VERSION = 1


def slot_uniforms(seed: int, step: int, question_id: str, slot: int) -> tuple[float, float]:
    """Two independent uniforms in [0, 1) of one slot: for the epsilon coin and for the language."""
    # The upper 53 bits fill a double's mantissa.
    return (
        (derive_seed("router.coin", seed, step, question_id, slot) >> 11) * 2.0**-53,
        (derive_seed("router.language", seed, step, question_id, slot) >> 11) * 2.0**-53,
    )


class SlotRouter(ABC):
    """Base of the routers: a subclass says p(l|x) and, where it learns, how."""

    def __init__(self, config: RouterConfig, languages: Sequence[str], seed: int) -> None:
        """`languages`: the L candidates. Raises ConfigError where there are none or one is named twice."""
        if not languages or len(set(languages)) != len(languages):
            raise ConfigError(f"router: candidate languages must be given, each once; got {list(languages)!r}.")
        self.languages = tuple(languages)
        self.policy = config.name
        self._index = {language: i for i, language in enumerate(self.languages)}
        self._config = config
        self._seed = int(seed)
        self._step = 0
        self._routed_probability = np.full(len(self.languages), np.nan)
        self._routed_entropy = math.nan
        self._routed_slots: Counter[str] = Counter()

    # --- what a subclass says -------------------------------------------------------------------------------------

    @abstractmethod
    def _policy_probabilities(self, prompt: Prompt) -> Probabilities:
        """p(.|x) without exploration, [L]."""

    @abstractmethod
    def _context(self, prompt: Prompt) -> Hashable:
        """Prompts of equal context have equal p(.|x)."""

    @abstractmethod
    def _learn(self, observations: Sequence[Observation]) -> None:
        """Take in one step's observations, checked and sorted by sample id."""

    @property
    def epsilon(self) -> float:
        """Probability that a slot draws uniformly."""
        return 0.0

    # --- drawing --------------------------------------------------------------------------------------------------

    def route(self, prompts: Sequence[Prompt], num_rollouts: int, step: int) -> list[RoutedPrompt]:
        """See LanguageRouter."""
        if num_rollouts < 1:
            raise ValueError(f"num_rollouts={num_rollouts}; a group has at least one rollout.")
        repeated = [name for name, count in Counter(p.question_id for p in prompts).items() if count > 1]
        if repeated:
            raise ValueError(f"question {repeated[0]!r} occurs twice in one step; its samples could not be told apart.")
        cache: dict[Hashable, tuple[Probabilities, list[float]]] = {}
        routed: list[RoutedPrompt] = []
        drawn_from: list[Probabilities] = []
        for prompt in prompts:
            fixed = self._fixed_language(prompt)
            reserved = num_rollouts if fixed else min(self._config.reserved_slots, num_rollouts)
            language, origin = (fixed, ORIGIN_FIXED) if fixed else (prompt.language, ORIGIN_RESERVED)
            routed += [RoutedPrompt(prompt, step, slot, language, origin, 1.0) for slot in range(reserved)]
            if reserved == num_rollouts:
                continue
            context = self._context(prompt)
            if context not in cache:
                policy = self._policy_probabilities(prompt)
                cumulative = np.cumsum(policy)
                cache[context] = (self._mixed(policy), (cumulative / cumulative[-1]).tolist())
            mixture, cumulative_policy = cache[context]
            drawn_from.append(mixture)
            for slot in range(reserved, num_rollouts):
                coin, point = slot_uniforms(self._seed, step, prompt.question_id, slot)
                # Inverse distribution function; bisect_right never lands on a language of probability 0.
                explore = coin < self.epsilon
                i = int(point * len(self.languages)) if explore else bisect.bisect_right(cumulative_policy, point)
                routed.append(
                    RoutedPrompt(prompt, step, slot, self.languages[i], ORIGIN_DRAWN, min(1.0, float(mixture[i])))
                )
        self._remember(routed, drawn_from)
        return routed

    def distribution(self, prompt: Prompt) -> Probabilities:
        """See LanguageRouter; all on one language where the question leaves no choice."""
        fixed = self._fixed_language(prompt)
        if fixed:
            return np.eye(len(self.languages))[self._index[fixed]]
        return self._mixed(self._policy_probabilities(prompt))

    def _mixed(self, policy: Probabilities) -> Probabilities:
        return self.epsilon / len(self.languages) + (1.0 - self.epsilon) * policy

    def _fixed_language(self, prompt: Prompt) -> str | None:
        """The language of every slot of `prompt`, None where there is a choice; checks the prompt's languages."""
        for field, language in (("language", prompt.language), ("fixed_language", prompt.fixed_language)):
            if language not in self._index and not (field == "fixed_language" and language is None):
                raise ValueError(
                    f"question {prompt.question_id!r}: {field}={language!r} is not a candidate of the router; "
                    f"accepted: {', '.join(self.languages)}."
                )
        if prompt.fixed_language is not None:
            return prompt.fixed_language
        return prompt.language if set(prompt.topics) & set(self._config.fixed_topics) else None

    # --- learning -------------------------------------------------------------------------------------------------

    def observe(self, observations: Sequence[Observation]) -> None:
        """See LanguageRouter."""
        seen: set[str] = set()
        for o in observations:
            if not math.isfinite(o.reward):
                raise ValueError(f"sample {o.sample_id!r}: reward {o.reward!r} is not finite; leave such samples out.")
            if o.language not in self._index:
                raise ValueError(
                    f"sample {o.sample_id!r}: language {o.language!r} is not a candidate of the router; "
                    f"accepted: {', '.join(self.languages)}."
                )
            if o.sample_id in seen:
                raise ValueError(f"sample {o.sample_id!r} was observed twice in one step.")
            seen.add(o.sample_id)
        self._step += 1
        self._learn(sorted(observations, key=lambda o: o.sample_id))

    # --- state and log --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """The part of the state that a saved one must share to be loaded."""
        return {"version": STATE_VERSION, "policy": self.policy, "languages": list(self.languages)}

    def state_dict(self) -> dict[str, Any]:
        """See LanguageRouter."""
        return {**self._identity(), "seed": self._seed, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See LanguageRouter."""
        for part, expected in self._identity().items():
            if part not in state:
                raise RouterStateError(f"router state: {part!r} is missing; it is not a complete saved router.")
            if state[part] != expected:
                raise RouterStateError(
                    f"router state: {part}={state[part]!r} was saved, this run has {expected!r}; continue with the "
                    "configuration and data of the saved run, or start a new one."
                )
        seed, step = (whole_number(state, part) for part in ("seed", "step"))
        self._load(state)
        self._seed, self._step = seed, step

    def _load(self, state: Mapping[str, Any]) -> None:
        """Load a subclass's part; all of it or, with RouterStateError, none."""

    def _remember(self, routed: Sequence[RoutedPrompt], drawn_from: Sequence[Probabilities]) -> None:
        self._routed_slots = Counter(r.origin for r in routed)
        if not drawn_from:
            self._routed_probability, self._routed_entropy = np.full(len(self.languages), np.nan), math.nan
            return
        rows = np.stack(drawn_from)
        logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
        self._routed_probability = rows.mean(axis=0)
        self._routed_entropy = float(-(rows * logs).sum(axis=1).mean())

    def metrics(self) -> dict[str, float]:
        """See LanguageRouter. Entropy in nats; probabilities are absent where the last call drew nothing."""
        values = {"step": float(self._step), "epsilon": self.epsilon}
        for origin in (ORIGIN_DRAWN, ORIGIN_RESERVED, ORIGIN_FIXED):
            values[f"slots/{origin}"] = float(self._routed_slots[origin])
        if not math.isnan(self._routed_entropy):
            values["entropy"] = self._routed_entropy
            for language, probability in zip(self.languages, self._routed_probability):
                values[f"probability/{language}"] = float(probability)
        return values


def whole_number(state: Mapping[str, Any], part: str) -> int:
    """`state[part]`, an integer >= 0; RouterStateError otherwise."""
    value = state.get(part)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RouterStateError(f"router state: {part}={value!r}; expected a whole number >= 0.")
    return value
