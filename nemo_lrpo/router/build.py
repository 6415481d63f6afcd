"""From configuration and the data's names to a router."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.router import OWN_LANGUAGE, RouterConfig
from nemo_lrpo.router.base import LanguageRouter
from nemo_lrpo.router.fixed import FixedMixRouter
from nemo_lrpo.router.published import PublishedRouter


def build_router(
    config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str], seed: int
) -> LanguageRouter:
    """The router that `config.name` asks for.

    `languages`: the L candidates, ISO 639-1; `topics`, `regions`: all that the training data uses. Their order is that
    of the tables and must be the same at a resume (sort them). Raises ConfigError for a mix or prior that names
    something else.
    """
    config.check("router")
    if config.name == "published":
        return PublishedRouter(config, languages, topics, regions, seed)
    mix = {
        "monolingual": {OWN_LANGUAGE: 1.0},
        "uniform": dict.fromkeys(languages, 1.0),
        "fixed": dict(config.mix),
    }[config.name]
    accepted = [*languages, OWN_LANGUAGE]
    for name in mix:
        if name not in accepted:
            raise ConfigError(unknown_key_message(name, accepted, "router.mix"))
    return FixedMixRouter(config, languages, mix, seed)
