"""What is compared: the arms, what they have in common, and a digest of all that an outcome depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf

from nemo_lrpo.config.loader import compose


@dataclass(frozen=True)
class Arm:
    """One way to train. `label`: for readers; `router`: a file of conf/router; `server`: overrides of the reward server
    that it trains with, where that is not the default one; `settings`: those of conf/demo.yaml that it alone has."""

    name: str
    label: str
    router: str
    server: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


ARMS = {
    arm.name: arm
    for arm in (
        Arm("grpo", "GRPO", "monolingual"),
        Arm("input_dominant", "input-dominant", "input_dominant"),
        Arm("en_dominant", "English-dominant", "en_dominant"),
        Arm("uniform", "uniform", "uniform"),
        # In so few steps its moving averages have to be faster than released.
        Arm("published", "LRPO, published router", "published", settings=("router.alpha=0.3",)),
        Arm("default", "LRPO, default router", "default"),
        Arm("spread", "LRPO, spread router", "spread"),
        Arm("no_calibration", "default, no calibration", "default", ("calibration.method=none",)),
        Arm("no_gate", "default, no gate", "default", ("language_id.gate=off",)),
    )
}
BASELINE = "grpo"
ANSWERS = 2
"""To each of the final questions, so that little of an outcome is the luck of the draw."""


@dataclass(frozen=True)
class World:
    """Where data and models are, as tools/build_data.py, tools/build_models.py and tools/calibrate.py leave them.
    `split`: of the questions that are asked in the end. `asked_in`: languages of the training questions, empty for
    all; of fewer, `chosen` is the file of those questions, which `choose` writes, and the base model was tuned in them
    (see tools/build_models.py --tuned-in)."""

    data: Path
    models: Path
    split: str = "test"
    asked_in: tuple[str, ...] = ()
    chosen: Path | None = None

    @property
    def train(self) -> Path:
        return self.data / "train.parquet" if self.chosen is None else self.chosen

    def choose(self) -> None:
        """Write the training questions in the languages `asked_in`. Raises ValueError where a language has none."""
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import parquet

        if self.chosen is None:
            return
        table = parquet.read_table(self.data / "train.parquet")
        languages = pc.struct_field(table["extra_info"], "language")
        missing = sorted(set(self.asked_in) - set(languages.to_pylist()))
        if missing:
            raise ValueError(f"--asked-in: {self.data / 'train.parquet'} has no question in {', '.join(missing)}.")
        self.chosen.parent.mkdir(parents=True, exist_ok=True)
        partial = self.chosen.with_name(f".{self.chosen.name}.partial")
        parquet.write_table(table.filter(pc.is_in(languages, value_set=pa.array(self.asked_in))), partial)
        partial.replace(self.chosen)

    @property
    def questions(self) -> Path:
        return self.data / f"{self.split}.parquet"

    @property
    def knowledge(self) -> Path:
        return self.data / "knowledge.json"

    @property
    def policies(self) -> Path:
        return self.models / "_".join(["tuned", *self.asked_in]) if self.asked_in else self.models

    @property
    def policy(self) -> Path:
        return self.policies / "base.nemo"

    @property
    def encoder(self) -> Path:
        return self.models / "encoder"

    @property
    def calibration(self) -> Path:
        return self.models / "calibration.json"


@dataclass(frozen=True)
class Plan:
    """The runs' common settings. `overrides`: of conf/demo.yaml, for every arm and the final questions alike."""

    world: World
    steps: int
    overrides: tuple[str, ...] = ()
    _found: dict[str, dict[str, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def train_settings(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of conf/demo.yaml, but for paths. Every rollout is logged, since its language is counted; nothing
        is validated or saved on the way."""
        return [
            f"router={arm.router}",
            *arm.settings,
            f"seed={seed}",
            f"trainer.lrpo.max_steps={self.steps}",
            "trainer.lrpo.max_epochs=1000",
            "data.validation=null",
            "trainer.lrpo.val_check_interval=0",
            "trainer.lrpo.save_interval=0",
            "trainer.lrpo.keep_checkpoints=1",
            "trainer.lrpo.export_nemo=false",
            "trainer.lrpo.log_samples=1000000",
            *self.overrides,
        ]

    def evaluate_settings(self, seed: int) -> list[str]:
        """Overrides of conf/demo_evaluate.yaml, but for paths."""
        return [f"seed={seed}", f"evaluation.samples={ANSWERS}", *self.overrides]

    def digests(self, arm: Arm) -> dict[str, str]:
        """What an outcome of `arm` depends on besides its seed, by name, each as a few hexadecimal digits. Source code
        is not among it: after a change of that begin another directory."""
        if arm.name not in self._found:
            train = OmegaConf.to_container(compose("demo", self.train_settings(arm, 0)), resolve=False)
            own = {"train": train, "reward": self._rewards(arm.server)}
            digests = {name: _digest(json.dumps(value, sort_keys=True)) for name, value in own.items()}
            self._found[arm.name] = self.common | digests
        return self._found[arm.name]

    @cached_property
    def common(self) -> dict[str, str]:
        """`digests`, as far as all arms share them."""
        world = self.world
        evaluation = OmegaConf.to_container(
            compose("demo_evaluate", [*self.evaluate_settings(0), "evaluation.out=out"]), resolve=False
        )
        return {
            "data": _files(world.train, world.knowledge),
            "questions": _files(world.questions),
            # base.nemo is an archive of it, with the times of its files.
            "policy": _files(world.policies / "base/model.safetensors", world.policies / "base/tokenizer.json"),
            "encoder": _files(world.encoder / "model.safetensors"),
            "calibration": _files(world.calibration),
            "evaluation": _digest(json.dumps([evaluation, self._rewards(())], sort_keys=True)),
        }

    @staticmethod
    def _rewards(overrides: Sequence[str]) -> object:
        return OmegaConf.to_container(compose("demo_rewards", overrides), resolve=False)


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _files(*paths: Path) -> str:
    return _digest(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
