"""The bandit around a policy, the same for all: slots, exploration, draws, windows, objective, price, state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.router import LEARNED, DiversityConfig, RouterConfig
from nemo_lrpo.router.base import Probabilities, RouterStateError, from_json, whole_number
from nemo_lrpo.router.budget import Price, Variation, group_sizes
from nemo_lrpo.router.draws import question_key, run_key, slot_uniforms
from nemo_lrpo.router.numbering import numbered_runs
from nemo_lrpo.router.objective import Objective
from nemo_lrpo.router.observed import Observed, first_seen, refuse_repeated, rewarded_rows
from nemo_lrpo.router.one_thread import on_one_thread
from nemo_lrpo.router.plan import DRAWN, FIXED, ORIGINS, RESERVED, LanguagePlan
from nemo_lrpo.router.policy import Context, LanguagePolicy
from nemo_lrpo.router.published import scheduled
from nemo_lrpo.router.sampling import Draws, diversify, inverted
from nemo_lrpo.router.state import NAMES, STATE_VERSION, Fit, upgraded
from nemo_lrpo.router.window import Window
from nemo_lrpo.types import Prompt

_KNOWN_QUESTIONS = 1 << 18
"""Questions whose facts are kept; beyond, the memory starts anew."""
_LOGGED_VALUES = 4096
"""Entries of the topics' values that the log takes; larger tables are in the checkpoint only."""


class _Question(NamedTuple):
    """What routing needs to know of a question; key: uint64, context: row of the router's contexts, own, fixed:
    languages, fixed -1 where there is a choice, unknown: topics and regions that were not declared."""

    prompt: Prompt
    key: int
    context: int
    own: int
    fixed: int
    unknown: int


class _Questions(NamedTuple):
    """The same of a step's N questions as columns, uint64 [N] and int64 [N]."""

    prompts: tuple[Prompt, ...]
    key: NDArray[np.uint64]
    context: NDArray[np.int64]
    own: NDArray[np.int64]
    fixed: NDArray[np.int64]
    unknown: NDArray[np.int64]

    @staticmethod
    def of(questions: Sequence[_Question]) -> _Questions:
        prompts, key, *numbers = zip(*questions) if questions else [()] * len(_Question._fields)
        return _Questions(prompts, np.array(key, np.uint64), *(np.array(column, np.int64) for column in numbers))


class BanditRouter:
    """Implements LanguageRouter around a LanguagePolicy."""

    def __init__(
        self,
        config: RouterConfig,
        policy: LanguagePolicy,
        languages: Sequence[str],
        topics: Sequence[str],
        regions: Sequence[str],
        seed: int,
    ) -> None:
        """`languages`: the L candidates. Raises ConfigError where there are none or one is named twice."""
        if not languages or len(set(languages)) != len(languages):
            raise ConfigError(f"router: candidate languages must be given, each once; got {list(languages)!r}.")
        self.languages = tuple(languages)
        self.topics, self.regions = tuple(dict.fromkeys(topics)), tuple(dict.fromkeys(regions))
        self._declared = frozenset(self.topics), frozenset(self.regions)
        self.policy = policy
        self._config = config
        self._index = {language: i for i, language in enumerate(self.languages)}
        self._fresh = policy.state()
        self._seed = int(seed)
        self._run_key = run_key(self._seed)
        self._step = 0
        self._updates = 0
        self._unknown_contexts = 0
        self._window = Window()
        self._objective, self._variation, self._price = self._bookkeeping()
        # What has been worked out about questions and may be forgotten at any time; no part of the state.
        self._questions: dict[str, _Question] = {}
        self._last = _Questions.of([])
        self._context_rows: dict[Context, int] = {}
        self._contexts: list[Context] = []
        self._last_route: dict[str, float] = {}

    def _bookkeeping(self) -> tuple[Objective, Variation, Price]:
        count = len(self.languages)
        config = self._config
        return Objective(config.objective, count), Variation(config.rollouts, count), Price(config.price, count)

    @property
    def epsilon(self) -> float:
        """Probability that a drawn slot draws uniformly, at the router's step."""
        return scheduled(self._config.epsilon, self._step) if self._config.name in LEARNED else 0.0

    # --- questions ------------------------------------------------------------------------------------------------

    def _look_up(self, prompts: tuple[Prompt, ...]) -> _Questions:
        if prompts is self._last.prompts:
            return self._last
        if len(self._questions) + len(prompts) > _KNOWN_QUESTIONS:
            self._questions, self._context_rows, self._contexts, self._last = {}, {}, [], _Questions.of([])
        known, found = self._questions, []
        for prompt in prompts:
            question = known.get(prompt.question_id)
            if question is None or question.prompt is not prompt:
                question = known[prompt.question_id] = self._facts(prompt)
            found.append(question)
        self._last = _Questions.of(found)._replace(prompts=prompts)
        return self._last

    def _facts(self, prompt: Prompt) -> _Question:
        own, fixed = self._candidate(prompt, "language"), -1
        if prompt.fixed_language is not None:
            fixed = self._candidate(prompt, "fixed_language")
        elif not set(self._config.fixed_topics).isdisjoint(prompt.topics):
            fixed = own
        context = self._context(prompt)
        row = self._context_rows.setdefault(context, len(self._contexts))
        if row == len(self._contexts):
            self._contexts.append(context)
        unknown = len(set(context.topics) - self._declared[0]) + len(set(context.regions) - self._declared[1])
        return _Question(prompt, question_key(self._run_key, prompt.question_id), row, own, fixed, unknown)

    def _candidate(self, prompt: Prompt, field: str) -> int:
        language = getattr(prompt, field)
        if language not in self._index:
            raise ValueError(
                f"question {prompt.question_id!r}: {field}={language!r} is not a candidate of the router; "
                f"accepted: {', '.join(self.languages)}."
            )
        return self._index[language]

    def _context(self, prompt: Prompt) -> Context:
        return Context(
            tuple(dict.fromkeys(prompt.topics)),
            tuple(dict.fromkeys(prompt.regions)),
            prompt.language if self.policy.per_language else "",
            prompt.question if self.policy.per_question else "",
        )

    # --- drawing --------------------------------------------------------------------------------------------------

    @on_one_thread
    def route(self, prompts: Sequence[Prompt], num_rollouts: int, step: int) -> LanguagePlan:
        """See LanguageRouter."""
        if num_rollouts < 1:
            raise ValueError(f"num_rollouts={num_rollouts}; a group has at least one rollout.")
        refuse_repeated(prompts, "occurs twice in one step; its samples could not be told apart")
        prompts, keys, context, own, fixed, _ = self._look_up(tuple(prompts))
        size = self._group_sizes(context, keys, num_rollouts)
        reserved = np.where(fixed >= 0, size, np.minimum(self._config.reserved_slots, size))
        first = np.cumsum(size) - size
        group = np.repeat(np.arange(len(prompts)), size)
        slot = np.arange(len(group)) - first[group]
        # In the order of the step: the rows of `_contexts` depend on what was asked before, and sums on their order.
        used, row = first_seen(context)
        mixture = self._mixture([self._contexts[c] for c in used])
        draws = Draws(
            first=first,
            size=size,
            reserved=reserved,
            row=row,
            mixture=mixture,
            points=slot_uniforms(keys, step, group, slot),
            language=np.where(fixed >= 0, fixed, own)[group],
            probability=np.ones(len(group)),
            restricted=np.zeros(len(group), bool),
        )
        drawn = slot >= reserved[group]
        self._draw(draws, np.flatnonzero(drawn), group)
        origin = np.where(drawn, DRAWN, np.where(fixed >= 0, FIXED, RESERVED)[group])
        self._remember(draws, origin)
        return LanguagePlan(
            prompts=prompts,
            step=step,
            languages=self.languages,
            group=group.astype(np.int32),
            slot=slot.astype(np.int16),
            language=draws.language.astype(np.int16),
            origin=origin.astype(np.int8),
            probability=draws.probability,
        )

    def _draw(self, draws: Draws, drawn: NDArray[np.int64], group: NDArray[np.int64]) -> None:
        """Fill the rows `drawn` of `draws`; group: [R]."""
        rows = draws.row[group[drawn]]
        draws.language[drawn] = inverted(draws.mixture, rows, draws.points[drawn])
        draws.probability[drawn] = np.minimum(draws.mixture[rows, draws.language[drawn]], 1.0)
        if self._config.diversity != DiversityConfig():
            diversify(draws, self._config.diversity)

    def _group_sizes(
        self, context: NDArray[np.int64], keys: NDArray[np.uint64], num_rollouts: int
    ) -> NDArray[np.int64]:
        """int64 [N]: rollouts of each question."""
        rules = self._config.rollouts
        if not rules.adaptive or not len(context):
            return np.full(len(context), num_rollouts, np.int64)
        spread = self._variation.expected([self._contexts[c] for c in context.tolist()])
        return group_sizes(spread, keys, num_rollouts * len(context), rules.min, rules.max)

    def _mixture(self, contexts: Sequence[Context]) -> NDArray[np.float64]:
        """float64 [C, L]: epsilon/L + (1 - epsilon) p."""
        if not contexts:
            return np.zeros((0, len(self.languages)))
        policy = self.policy.probabilities(contexts, self._step, self._price.charges)
        epsilon = self.epsilon
        return epsilon / len(self.languages) + (1.0 - epsilon) * policy if epsilon else policy

    @on_one_thread
    def distribution(self, prompt: Prompt) -> Probabilities:
        """See LanguageRouter; all on one language where the question leaves no choice."""
        question = self._look_up((prompt,))
        if question.fixed[0] >= 0:
            return np.eye(len(self.languages))[question.fixed[0]]
        return self._mixture([self._contexts[question.context[0]]])[0]

    # --- learning -------------------------------------------------------------------------------------------------

    @on_one_thread
    def observe(self, plan: LanguagePlan, rewards: NDArray[np.float64]) -> None:
        """See LanguageRouter."""
        rows = self._observed(plan, np.asarray(rewards, np.float64))
        self._variation.observe(rows)
        value = self._objective.values(rows)
        self._unknown_contexts += rows.unknown
        self._step += 1
        if self._config.name in LEARNED:
            teaches = np.isfinite(value) & (rows.drawn | (self._config.teach == "all"))
            self._window.add(
                rows.contexts, rows.context[teaches], rows.language[teaches], value[teaches], rows.group[teaches]
            )
        if self._window.steps >= self._config.update_every:
            self.policy.learn(self._window.evidence())
            self._window = Window()
            self._updates += 1

    def _observed(self, plan: LanguagePlan, rewards: NDArray[np.float64]) -> Observed:
        if plan.languages != self.languages:
            raise ValueError(f"the plan is for languages {plan.languages}, the router for {self.languages}.")
        rows, place = rewarded_rows(plan, rewards)
        questions, group = self._look_up(plan.prompts), plan.group[rows]
        first, run = numbered_runs(group)
        used, position = first_seen(questions.context[group[first]])
        return Observed(
            contexts=[self._contexts[row] for row in used],
            context=position[run],
            group=place[group],
            groups=len(place),
            unknown=int(questions.unknown[group].sum()),
            language=plan.language[rows],
            drawn=plan.origin[rows] == DRAWN,
            reward=rewards[rows],
        )

    def observe_costs(self, plan: LanguagePlan, costs: NDArray[np.float64]) -> None:
        """See LanguageRouter."""
        costs = np.asarray(costs, np.float64)
        if costs.shape != (len(plan),) or not (np.isfinite(costs) & (costs >= 0.0)).all():
            raise ValueError(f"costs must be finite and >= 0, one for each of {len(plan)} rows.")
        # Sorted: sums of costs that are no whole numbers depend on the order.
        order = np.lexsort((costs, plan.language))
        self._price.observe(plan.language[order], costs[order])

    # --- state and log --------------------------------------------------------------------------------------------

    @property
    def _names(self) -> dict[str, tuple[str, ...]]:
        return dict(zip(NAMES, (self.languages, self.topics, self.regions)))

    @on_one_thread
    def state_dict(self) -> dict[str, Any]:
        """See LanguageRouter. `learned` is the policy's part, `window` what it has not learned from yet."""
        return {
            "version": STATE_VERSION,
            "policy": self.policy.name,
            **{axis: list(names) for axis, names in self._names.items()},
            "seed": self._seed,
            "step": self._step,
            "updates": self._updates,
            "unknown_contexts": self._unknown_contexts,
            "learned": self.policy.state(),
            "window": self._window.state(),
            "progress": self._objective.means.state(),
            "spread": self._variation.cells.state(),
            "costs": self._price.state(),
        }

    @on_one_thread
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See LanguageRouter."""
        state = upgraded(from_json(state))
        missing = [part for part in self.state_dict() if part not in state]
        if missing:
            raise RouterStateError(f"router state: {missing[0]!r} is missing; it is not a complete saved router.")
        if state["policy"] != self.policy.name:
            raise RouterStateError(
                f"router state: policy={state['policy']!r} was saved, this run has {self.policy.name!r}; continue with "
                "the configuration of the saved run, or start a new one."
            )
        fit = Fit.of(state, self._names)
        counters = [whole_number(state, part) for part in ("seed", "step", "updates", "unknown_contexts")]
        window = Window.of(state["window"], fit.places["languages"])
        objective, variation, price = self._bookkeeping()
        for name, part in (("progress", objective.means), ("spread", variation.cells), ("costs", price)):
            # Version 1 had none of them.
            if state[name] is not None:
                part.restore(name, state[name], fit)
        axes, learned = self.policy.state_axes, state["learned"]
        self.policy.load(
            {k: fit.array(k, v, axes[k], self._fresh.get(k)) if k in axes else v for k, v in learned.items()}
        )
        self._seed, self._step, self._updates, self._unknown_contexts = counters
        self._run_key, self._questions, self._last = run_key(self._seed), {}, _Questions.of([])
        self._window, self._objective, self._variation, self._price = window, objective, variation, price

    def _remember(self, draws: Draws, origin: NDArray[np.integer]) -> None:
        counts = np.bincount(origin, minlength=len(ORIGINS)).tolist()
        last = {f"slots/{name}": float(count) for name, count in zip(ORIGINS, counts)}
        last["slots/restricted"] = float(draws.restricted.sum())
        choice = draws.reserved < draws.size
        if choice.any():
            weight = np.bincount(draws.row[choice], minlength=len(draws.mixture)) / choice.sum()
            logs = np.log(draws.mixture, out=np.zeros_like(draws.mixture), where=draws.mixture > 0)
            last["entropy"] = float(-(weight @ (draws.mixture * logs).sum(axis=1)))
            last |= dict(zip((f"probability/{x}" for x in self.languages), (weight @ draws.mixture).tolist()))
        if self._config.rollouts.adaptive and len(draws.size):
            last |= {"rollouts/min": float(draws.size.min()), "rollouts/max": float(draws.size.max())}
        self._last_route = last

    @on_one_thread
    def metrics(self) -> dict[str, float]:
        """See LanguageRouter. Entropy in nats; it and the probabilities are absent where the last call drew nothing.

        `slots/<origin>` count rows, `slots/restricted` those drawn under a rule of `router.diversity`;
        `value/<topic>/<language>` is the policy's estimate for a question of that topic and no region.
        """
        values = {
            "step": float(self._step),
            "epsilon": self.epsilon,
            "updates": float(self._updates),
            "pending_steps": float(self._window.steps),
            "unknown_contexts": float(self._unknown_contexts),
            **self._last_route,
            **self.policy.metrics(self._step),
        }
        if self._config.price.active:
            values["price"] = self._price.price
            values |= {f"cost/{x}": c for x, c in zip(self.languages, self._price.relative.tolist())}
        if len(self.topics) * len(self.languages) <= _LOGGED_VALUES and self._config.name in LEARNED:
            table = self.policy.values([Context((topic,), ()) for topic in self.topics])
            for topic, row in zip(self.topics, table.tolist()):
                values |= {f"value/{topic}/{x}": v for x, v in zip(self.languages, row) if math.isfinite(v)}
        return values
