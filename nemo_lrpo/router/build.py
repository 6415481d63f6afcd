"""From configuration and the data's names to a router."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.policy import LanguagePolicy
from nemo_lrpo.router.router import BanditRouter

_POLICIES = {
    "published": "published.PublishedPolicy",
    "monolingual": "fixed.FixedMix",
    "uniform": "fixed.FixedMix",
    "fixed": "fixed.FixedMix",
    "ucb": "ucb.UcbPolicy",
    "thompson": "thompson.ThompsonPolicy",
    "hierarchical": "hierarchical.HierarchicalPolicy",
    "features": "features.FeaturePolicy",
}
"""`router.name` -> module of this room and class; imported when it is asked for."""


def build_policy(
    config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
) -> LanguagePolicy:
    """The policy that `config.name` asks for, names without repetition."""
    module, _, name = _POLICIES[config.name].partition(".")
    policy = getattr(import_module(f"nemo_lrpo.router.{module}"), name)
    return policy(config, tuple(languages), tuple(dict.fromkeys(topics)), tuple(dict.fromkeys(regions)))


def build_router(
    config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str], seed: int
) -> BanditRouter:
    """The router around that policy.

    `languages`: the L candidates, ISO 639-1; `topics`, `regions`: all that the training data uses. Raises ConfigError
    for a mix or prior that names something else.
    """
    config.check("router")
    policy = build_policy(config, languages, topics, regions)
    return BanditRouter(config, policy, languages, topics, regions, seed)
