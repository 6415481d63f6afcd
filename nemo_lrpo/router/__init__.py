"""Which language each rollout of a question is generated in. NumPy only; knows neither models nor rewards' origin."""

from nemo_lrpo.router.base import LanguageRouter, RouterStateError, from_json, to_json
from nemo_lrpo.router.build import build_router
from nemo_lrpo.router.plan import LanguagePlan

__all__ = ["LanguagePlan", "LanguageRouter", "RouterStateError", "build_router", "from_json", "to_json"]
