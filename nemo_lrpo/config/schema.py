"""The training configuration: our sections are typed and closed, NeMo's are passed through.

`trainer` (Lightning), `model` and `exp_manager` (NeMo) are checked where those libraries are imported; everything else
is a dataclass of this room, and a key that it does not have is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict

from nemo_lrpo.config.algorithm import AlgorithmConfig
from nemo_lrpo.config.data import DataConfig, PromptConfig
from nemo_lrpo.config.evaluation import EvaluationConfig, TasksConfig
from nemo_lrpo.config.mode import ModeConfig
from nemo_lrpo.config.pairs import MethodConfig, PairDataConfig
from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.config.training import (
    ActorConfig,
    LoopConfig,
    PairLoopConfig,
    PretrainedConfig,
    RolloutConfig,
    StepsConfig,
)


@dataclass
class RunConfig:
    """What every run that trains a policy has, whatever it trains on."""

    seed: int = 1234
    """Every draw of a run is a function of it, the step, the question and the slot."""
    run_dir: str = "results/run"
    """Directory of logs, checkpoints and the exported .nemo."""
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    loop: StepsConfig = field(default_factory=StepsConfig)
    """`trainer.lrpo` in the file."""
    trainer: Dict[str, Any] = field(default_factory=dict)
    """Lightning's Trainer arguments, `lrpo` taken out."""
    model: Dict[str, Any] = field(default_factory=dict)
    """Overrides of the .nemo's model configuration."""
    exp_manager: Dict[str, Any] = field(default_factory=dict)
    """NeMo's experiment manager."""

    ROWS_OF_AN_UPDATE: ClassVar[str]
    """The keys that `rows_per_update` comes from."""

    @property
    def rows_per_update(self) -> int:
        """Sequences, over all ranks, between two steps of the optimizer."""
        raise NotImplementedError

    @property
    def keeps_initial_policy(self) -> bool:
        """Whether training asks for log-probs of the policy that it began with."""
        raise NotImplementedError


@dataclass
class TrainConfig(RunConfig):
    """The whole of `conf/train.yaml`."""

    mode: ModeConfig = field(default_factory=ModeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    reward: RewardClientConfig = field(default_factory=RewardClientConfig)
    evaluation: TasksConfig = field(default_factory=TasksConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    ROWS_OF_AN_UPDATE = "trainer.lrpo.prompts_per_step * rollouts_per_prompt / algorithm.num_updates"

    @property
    def rows_per_update(self) -> int:
        return self.loop.prompts_per_step * self.loop.rollouts_per_prompt // self.algorithm.num_updates

    @property
    def keeps_initial_policy(self) -> bool:
        return self.algorithm.kl_coefficient > 0


@dataclass
class EvaluateConfig(TrainConfig):
    """The whole of `conf/evaluate.yaml`: a training configuration that trains nothing."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def _update_by_pairs() -> AlgorithmConfig:
    """Under which the policy's update, given the right advantages, has the gradient of a loss over pairs
    (nemo_lrpo/algorithms/preference.py)."""
    return AlgorithmConfig(kl_coefficient=0.0, aggregation="sequence_mean", num_updates=1)


@dataclass
class OfflineConfig(RunConfig):
    """The whole of `conf/train_offline.yaml`: training over preference pairs. No answers are drawn; of `rollout` the
    temperature counts alone, which is part of what the policy is."""

    data: PairDataConfig = field(default_factory=PairDataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    loop: PairLoopConfig = field(default_factory=PairLoopConfig)
    algorithm: AlgorithmConfig = field(init=False, default_factory=_update_by_pairs)

    ROWS_OF_AN_UPDATE = "trainer.lrpo.pairs_per_step * the answers of a pair"

    @property
    def rows_per_update(self) -> int:
        return self.loop.pairs_per_step * self.method.rows_per_pair

    @property
    def keeps_initial_policy(self) -> bool:
        return True
