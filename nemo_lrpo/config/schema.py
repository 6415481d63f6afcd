"""The training configuration: our sections are typed and closed, NeMo's are passed through.

`trainer` (Lightning), `model` and `exp_manager` (NeMo) are checked where those libraries are imported; everything else
is a dataclass of this room, and a key that it does not have is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict

from nemo_lrpo.config.algorithm import AlgorithmConfig
from nemo_lrpo.config.data import DataConfig, PromptConfig
from nemo_lrpo.config.evaluation import EvaluationConfig, TasksConfig
from nemo_lrpo.config.mode import ModeConfig
from nemo_lrpo.config.reward import RewardClientConfig
from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.config.training import ActorConfig, LoopConfig, PretrainedConfig, RolloutConfig


@dataclass
class TrainConfig:
    """The whole of `conf/train.yaml`."""

    seed: int = 1234
    """Every draw of a run is a function of it, the step, the question and the slot."""
    run_dir: str = "results/run"
    """Directory of logs, checkpoints and the exported .nemo."""
    mode: ModeConfig = field(default_factory=ModeConfig)
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardClientConfig = field(default_factory=RewardClientConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    evaluation: TasksConfig = field(default_factory=TasksConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    """`trainer.lrpo` in the file."""
    trainer: Dict[str, Any] = field(default_factory=dict)
    """Lightning's Trainer arguments, `lrpo` taken out."""
    model: Dict[str, Any] = field(default_factory=dict)
    """Overrides of the .nemo's model configuration."""
    exp_manager: Dict[str, Any] = field(default_factory=dict)
    """NeMo's experiment manager."""


@dataclass
class EvaluateConfig(TrainConfig):
    """The whole of `conf/evaluate.yaml`: a training configuration that trains nothing."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
