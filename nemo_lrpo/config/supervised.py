"""`conf/train_sft.yaml`: the cold start, supervised training on traces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_file, check_range
from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.training import CheckpointConfig, PretrainedConfig, StopConfig


@dataclass
class TraceDataConfig:
    """`data`: traces as tools/make_traces.py writes them; nemo_lrpo/explang/traces.py describes a row."""

    train: Optional[str] = None
    """Training traces, JSONL."""
    validation: Optional[str] = None
    """Traces whose loss is measured between training steps; null: none."""
    max_tokens: int = 4096
    """Longest sequence in tokens, prompt, response and end token included."""
    over_long: str = "reject"
    """What becomes of a longer one: reject stops the run before it starts, naming it; drop leaves it out."""

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, unless files exist and values can be used."""
        remedy = "give a file of traces, JSONL (tools/make_traces.py makes them)"
        check_file(f"{key}.train", self.train, remedy)
        if self.validation is not None:
            check_file(f"{key}.validation", self.validation, remedy)
        check_range(f"{key}.max_tokens", self.max_tokens, at_least=2)
        check_choice(f"{key}.over_long", self.over_long, ("reject", "drop"))


@dataclass
class SupervisedLoopConfig:
    """`trainer.sft`: how many steps, of what size, and what happens between them."""

    max_steps: int = -1
    """Training stops after this many steps in all, resumed ones counted; -1: only `max_epochs` ends it."""
    max_epochs: int = 3
    """Passes over the traces; those that fill no whole step are left out of a pass, in each pass others."""
    traces_per_step: int = 64
    """Traces per step over all data-parallel ranks, one update; a multiple of ranks times model.micro_batch_size."""
    val_check_interval: int = 0
    """Measure the loss on data.validation every so many steps and after the last one; 0: never."""
    save_interval: int = 0
    """Save a checkpoint every so many steps (a multiple of val_check_interval); 0: only after the last one."""
    keep_checkpoints: int = 2
    """Completed checkpoints kept, the newest ones; 0 keeps all."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export_nemo: bool = True
    """Write `<run_dir>/model.nemo` after the last step, adapters merged."""
    stop: StopConfig = field(default_factory=StopConfig)
    """What happens when the run is told to stop."""
    progress_timeout_s: float = 1800.0
    """Seconds that the ranks wait for each other."""

    def check(self, key: str) -> None:
        """Raise ConfigError, naming the field, for a value that cannot train."""
        check_range(f"{key}.max_steps", self.max_steps, at_least=-1)
        for name in ("max_epochs", "traces_per_step"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=1)
        for name in ("val_check_interval", "save_interval", "keep_checkpoints"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=0)
        check_range(f"{key}.progress_timeout_s", self.progress_timeout_s, above=0.0, at_most=1e6)
        self.checkpoint.check(f"{key}.checkpoint")
        self.stop.check(f"{key}.stop")
        if self.max_steps == 0:
            raise ConfigError(f"{key}.max_steps=0 trains nothing; give a positive number, or -1 for no limit.")
        # NeMo-Aligner's loop asserts it.
        if self.val_check_interval and self.save_interval % self.val_check_interval:
            raise ConfigError(
                f"{key}.save_interval={self.save_interval} must be a multiple of "
                f"{key}.val_check_interval={self.val_check_interval}, or 0."
            )


@dataclass
class SupervisedConfig:
    """The whole of `conf/train_sft.yaml`."""

    seed: int = 1234
    """The order of the traces is a function of it and the epoch; so are new adapters."""
    run_dir: str = "results/cold_start"
    """Directory of logs, checkpoints and the exported .nemo."""
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    data: TraceDataConfig = field(default_factory=TraceDataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    marks: MarksConfig = field(default_factory=MarksConfig)
    """By which every trace is read back before it is trained on; those that training by reward will use."""
    loop: SupervisedLoopConfig = field(default_factory=SupervisedLoopConfig)
    """`trainer.sft` in the file."""
    trainer: Dict[str, Any] = field(default_factory=dict)
    """Lightning's Trainer arguments, `sft` taken out."""
    model: Dict[str, Any] = field(default_factory=dict)
    """Overrides of the .nemo's model configuration."""
    exp_manager: Dict[str, Any] = field(default_factory=dict)
    """NeMo's experiment manager."""
