"""`mode`: who chooses the language of a rollout, and what its reward is made of."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lrpo.config.checks import ConfigError, check_choice, check_range
from nemo_lrpo.config.explang import ExplangConfig

LRPO = "lrpo"
EXPLANG = "explang"


@dataclass
class ModeConfig(ExplangConfig):
    """`mode=explang` for ExpLang; all keys but `name` are of that mode."""

    name: str = LRPO
    """lrpo: the router chooses the language of every answer. explang: answers are in the question's language, and the
    policy chooses the language that it thinks in; the router proposes some, see forced_rollouts."""
    forced_rollouts: int = 0
    """K_forced: the first so many rollouts of every question think in a language that the router proposes, in which
    router.reserved_slots count; the others think in one that the policy chooses. The router learns from r_c * r_v of
    the former. 0, as published: the policy chooses for all."""

    @property
    def thought_in(self) -> list[str]:
        """Languages that the policy may choose to think in of its own accord, which what scores it has to know."""
        return list(self.seen) if self.name == EXPLANG else []

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, for a value that cannot train, or that `lrpo` has no use for."""
        check_choice(f"{key}.name", self.name, (LRPO, EXPLANG))
        if self.name == LRPO:
            plain = ModeConfig()
            for name in self.__dataclass_fields__:
                if getattr(self, name) != getattr(plain, name):
                    raise ConfigError(f"{key}.{name} is set, which {key}.name=lrpo has no use for; give mode=explang.")
        super().check(key)
        check_range(f"{key}.forced_rollouts", self.forced_rollouts, at_least=0)
