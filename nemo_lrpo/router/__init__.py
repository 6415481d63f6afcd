"""Which language each rollout of a question is generated in. NumPy only; knows neither models nor rewards' origin."""

from nemo_lrpo.router.base import LanguageRouter, RouterStateError
from nemo_lrpo.router.build import build_router

__all__ = ["LanguageRouter", "RouterStateError", "build_router"]
