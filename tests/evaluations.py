"""Starts of nemo_lrpo.evaluate from a warm process, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warm_start import Starter


class Evaluations:
    """Starts of nemo_lrpo.evaluate."""

    def __init__(self, starter: Starter, settings: dict[str, object]):
        self._starter = starter
        self._settings = settings

    def __call__(
        self,
        out: Path,
        *,
        ranks: int = 1,
        expect: int = 0,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        **changes: object,
    ) -> tuple[dict[str, Any], str]:
        """The result and what was printed; keys of `changes` have `__` for dots, `before` runs in every rank first."""
        more = {key.replace("__", "."): value for key, value in changes.items()}
        arguments = {**self._settings, "evaluation.out": out, "trainer.devices": ranks, **more}
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.parent / f"{out.stem}_{len(list(out.parent.glob('*.log')))}.log"
        log.touch()
        line = ["--config-name", "demo_evaluate", *(f"{key}={value}" for key, value in arguments.items())]
        before = before or (only_weights if ranks == 1 else None)
        started = self._starter(
            line, log, ranks=ranks, environment=environment, entry="nemo_lrpo.evaluate", before=before
        )
        codes = started.wait()
        assert codes == [expect] * ranks, f"{codes}\n{started.text}"
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}, started.text


def only_weights() -> None:
    """Building an optimizer, or buffers of gradients, ends this process."""
    from megatron.core.distributed import DistributedDataParallel

    from nemo_lrpo.actor.policy import LrpoActorModel

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an evaluation needs weights alone")

    DistributedDataParallel.__init__ = refuse
    LrpoActorModel.setup_optimization = refuse
