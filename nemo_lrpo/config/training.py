"""Sections of the training configuration that belong to the loop: steps, rollouts, actor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import List, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_range


@dataclass
class StopConfig:
    """`trainer.lrpo.stop`: how a run is ended from outside. SIGTERM, SIGUSR1 and the end of the job's time make it save
    and exit with code 75, after the step under way where that still fits."""

    time_limit: Optional[str] = None
    """Length of the job, [D-]HH:MM:SS or seconds, counted from the job's start (Slurm's, where it says so, else this
    process's). Where Slurm says when the job ends, that is heeded without this key."""
    grace_seconds: float = 30.0
    """From a signal to the moment when the launcher kills the job. Slurm (KillWait) and torchrun give 30 s."""
    margin: float = 1.5
    """Factor on the measured times of steps and saves, when it is worked out what still fits."""
    no_progress_limit: int = 3
    """After so many starts in a row that have not completed a step the exit code is 79 in place of 75; 0: never."""

    @property
    def seconds(self) -> float | None:
        """`time_limit` in seconds."""
        if self.time_limit is None:
            return None
        match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)|(\d+)", self.time_limit.strip())
        if match is None:
            return math.nan
        days, hours, minutes, seconds, alone = (float(part or 0) for part in match.groups())
        return days * 86400 + hours * 3600 + minutes * 60 + seconds + alone

    def check(self, key: str) -> None:
        # NaN is not above zero either.
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"{key}.time_limit={self.time_limit!r}: give [D-]HH:MM:SS, seconds, or null for none.")
        check_range(f"{key}.grace_seconds", self.grace_seconds, at_least=0.0, below=math.inf)
        check_range(f"{key}.margin", self.margin, at_least=1.0, below=math.inf)
        check_range(f"{key}.no_progress_limit", self.no_progress_limit, at_least=0)


@dataclass
class CheckpointConfig:
    """`trainer.lrpo.checkpoint`: which checkpoints are kept, and how they are written and found."""

    keep_best: int = 0
    """Checkpoints kept for the best values of `best_metric`, besides the newest `keep_checkpoints`; 0: none."""
    best_metric: str = "reward"
    """A metric of the step that is saved, as metrics.jsonl names it: reward, reward/sw, policy/kl, ...; those of a
    validation begin with `validation/`: validation/reward, validation/reward/sw. In mode=explang `reward` is the
    weighted sum that the policy learns from, `validation/reward` r_c * r_v: compliance times correctness."""
    best_mode: str = "max"
    """max or min: which values of the metric are best."""
    on_damage: str = "stop"
    """A completed checkpoint is found damaged: stop with its name, or go on from the next older one with a warning. The
    damaged one then becomes NAME.passed_over, and is removed when the run saves that step, or a later one."""
    async_save: bool = False
    """Write the shards of periodic checkpoints in the background while the next steps run; the last one is waited for.
    Takes the memory of a second copy of model and optimizer on the host."""

    def check(self, key: str) -> None:
        check_range(f"{key}.keep_best", self.keep_best, at_least=0)
        check_choice(f"{key}.best_mode", self.best_mode, ("max", "min"))
        check_choice(f"{key}.on_damage", self.on_damage, ("stop", "older"))
        if not self.best_metric:
            raise ConfigError(f"{key}.best_metric is empty; name a metric of metrics.jsonl, such as reward.")


@dataclass
class StepsConfig:
    """`trainer.lrpo`, whatever a step is: how many, and what happens between them."""

    max_steps: int = -1
    """Training stops after this many steps in all, resumed ones counted; -1: only `max_epochs` ends it."""
    max_epochs: int = 1
    """Passes over the training data."""
    stop_after_steps: int = 0
    """End this process, with a checkpoint, after so many steps of its own; starting it again continues. 0: never."""
    val_check_interval: int = 20
    """Validate every so many steps and after the last one; 0: never."""
    val_at_start: bool = False
    """Validate once before the first step as well."""
    save_interval: int = 20
    """Save a checkpoint every so many steps and after the last one; 0: only after the last one."""
    keep_checkpoints: int = 2
    """Completed checkpoints kept, the newest ones; 0 keeps all."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export_nemo: bool = True
    """Write `<run_dir>/model.nemo` after the last step."""
    stop: StopConfig = field(default_factory=StopConfig)
    """What happens when the run is told to stop."""
    on_non_finite: str = "stop"
    """What a loss or gradient that is not finite does to the run: stop, saved as before the step; or skip: the policy
    stays as it is for this step (with algorithm.num_updates > 1, from that update on), and the step is counted."""
    max_non_finite: int = 3
    """With on_non_finite=skip: so many such steps in a row stop the run after all."""
    progress_timeout_s: float = 1800.0
    """Seconds that a rank may go without progress (a batch of answers, a micro batch, the others' arrival, a file);
    beyond, the process ends, and those of the other ranks with it."""

    def check(self, key: str) -> None:
        check_range(f"{key}.max_steps", self.max_steps, at_least=-1)
        check_range(f"{key}.max_epochs", self.max_epochs, at_least=1)
        for name in ("stop_after_steps", "val_check_interval", "save_interval", "keep_checkpoints"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=0)
        self.stop.check(f"{key}.stop")
        self.checkpoint.check(f"{key}.checkpoint")
        check_choice(f"{key}.on_non_finite", self.on_non_finite, ("stop", "skip"))
        check_range(f"{key}.max_non_finite", self.max_non_finite, at_least=1)
        check_range(f"{key}.progress_timeout_s", self.progress_timeout_s, above=0.0, at_most=1e6)
        if self.max_steps == 0:
            raise ConfigError(f"{key}.max_steps=0 trains nothing; give a positive number, or -1 for no limit.")


@dataclass
class LoopConfig(StepsConfig):
    """`trainer.lrpo` of training by rollouts: of what size a step is, and what is shown of it."""

    prompts_per_step: int = 256
    """Questions per step; the step generates prompts_per_step * rollouts_per_prompt answers."""
    rollouts_per_prompt: int = 8
    """K, the size of a group."""
    val_prompts: int = 512
    """At most so many validation questions (the first of the file, in file order); 0: all."""
    val_temperature: float = 0.0
    """Sampling temperature of validation answers; 0 is greedy."""
    log_samples: int = 8
    """Rollouts written as text to rollouts.jsonl at every step."""

    def check(self, key: str) -> None:
        super().check(key)
        check_range(f"{key}.prompts_per_step", self.prompts_per_step, at_least=1)
        check_range(f"{key}.rollouts_per_prompt", self.rollouts_per_prompt, at_least=1)
        check_range(f"{key}.val_temperature", self.val_temperature, at_least=0.0)
        for name in ("val_prompts", "log_samples"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=0)


@dataclass
class PairLoopConfig(StepsConfig):
    """`trainer.lrpo` of training over preference pairs."""

    pairs_per_step: int = 64
    """Pairs per step, which is one update of the policy."""

    def check(self, key: str) -> None:
        super().check(key)
        check_range(f"{key}.pairs_per_step", self.pairs_per_step, at_least=1)


@dataclass
class TensorRTConfig:
    """`rollout.trt_llm`: used when rollout.backend is trt_llm."""

    model_type: str = "llama"
    """Architecture name as nemo.export knows it (llama, qwen2, gemma, ...)."""
    max_input_len: int = 512
    """Longest prompt, in tokens, that the engine is built for."""
    unload_engine_train: bool = False
    """Free the engine while the policy trains; saves memory, costs a reload per step."""
    reshard: bool = False
    """Generate with pipeline parallelism folded into data parallelism."""

    def check(self, key: str) -> None:
        check_range(f"{key}.max_input_len", self.max_input_len, at_least=1)


@dataclass
class MismatchConfig:
    """`rollout.mismatch`: the policy that generates and the one that trains are two programs with the same weights.

    With ratio = exp(log-prob in training - log-prob in generation) of a sampled token, `policy/mismatch_ratio` is its
    mean, `policy/mismatch_deviation` the mean of |ratio - 1| and `policy/mismatch_truncated` the share above `cap`, in
    all and by language."""

    log: bool = True
    """Keep the engine's log-probs and log how they compare. TensorRT-LLM has comparable ones without pipeline stages
    (see trt_llm.reshard) and without top_k."""
    stop_above: Optional[float] = None
    """A language whose deviation is larger stops the run, saved as before the step; null: none does."""
    correct: str = "none"
    """truncated: every token's policy loss is weighted with min(ratio, cap), which makes up for the difference;
    none: it is not weighted."""
    cap: float = 2.0
    """Largest weight of correct=truncated."""

    @property
    def needed(self) -> bool:
        """Whether training depends on the engine's log-probs."""
        return self.stop_above is not None or self.correct != "none"

    def check(self, key: str) -> None:
        if self.stop_above is not None:
            check_range(f"{key}.stop_above", self.stop_above, above=0.0, below=math.inf)
        check_choice(f"{key}.correct", self.correct, ("none", "truncated"))
        check_range(f"{key}.cap", self.cap, at_least=1.0, below=math.inf)
        if self.needed and not self.log:
            raise ConfigError(f"{key}.log=false leaves nothing for stop_above and correct to go by; set it to true.")


@dataclass
class RolloutConfig:
    """`rollout`: how answers are sampled from the policy."""

    backend: str = "megatron"
    """megatron: NeMo's own generation; trt_llm: NeMo-Aligner's TensorRT-LLM engine (needs a GPU)."""
    micro_batch_size: int = 16
    """Answers generated at once on one data-parallel rank."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature), in sampling and in log-probs alike."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most probable tokens that hold this probability; 1: all."""
    max_new_tokens: int = 1024
    """Budget of a response, in tokens; one that has not ended by then is masked in the update."""
    min_new_tokens: int = 1
    """The end token has no probability before this many response tokens."""
    end_strings: List[str] = field(default_factory=list)
    """Strings that end a response besides the tokenizer's end token."""
    retries: int = 1
    """A batch of answers whose generation fails is generated again so many times, from the same seeds; then the run
    stops. Without tensor and pipeline parallelism only: ranks that share a model cannot begin a batch again alone."""
    spread: str = "length"
    """How answers are spread over batches and data-parallel ranks. length: a batch has answers of like expected length
    (running means by language and topic, saved with the run), the longest go first, each to the rank that has least to
    do; plan: every rank has every so-many-th answer, in batches of like prompts. Tokens do not depend on it."""
    keep_groups: bool = False
    """With spread=length: the answers of one question share a batch where they fit, for engines that share prefixes.
    Neither of the two does today: TensorRT-LLM can in its C++ runner alone, and takes new weights in its Python one
    alone (nemo_lrpo/actor/trt_llm_facts.json, no_prefix_sharing)."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    trt_llm: TensorRTConfig = field(default_factory=TensorRTConfig)

    def check(self, key: str) -> None:
        check_choice(f"{key}.backend", self.backend, ("megatron", "trt_llm"))
        check_range(f"{key}.micro_batch_size", self.micro_batch_size, at_least=1)
        check_range(f"{key}.temperature", self.temperature, above=0.0)
        check_range(f"{key}.top_k", self.top_k, at_least=0)
        check_range(f"{key}.top_p", self.top_p, above=0.0, at_most=1.0)
        check_range(f"{key}.max_new_tokens", self.max_new_tokens, at_least=1)
        check_range(f"{key}.retries", self.retries, at_least=0)
        check_range(f"{key}.min_new_tokens", self.min_new_tokens, at_least=0, at_most=self.max_new_tokens)
        check_choice(f"{key}.spread", self.spread, ("length", "plan"))
        self.mismatch.check(f"{key}.mismatch")
        self.trt_llm.check(f"{key}.trt_llm")
        if "" in self.end_strings:
            raise ConfigError(f"{key}.end_strings={list(self.end_strings)!r} has an empty string; leave it out.")
        if self.backend == "trt_llm":
            self._check_engine(key)

    def _check_engine(self, key: str) -> None:
        """What TensorRT-LLM and NeMo-Aligner's adapter to it cannot do."""
        with_comma = [end for end in self.end_strings if "," in end]
        if with_comma:
            raise ConfigError(
                f"{key}.end_strings: {with_comma[0]!r} has a comma, at which NeMo-Aligner splits the strings for "
                "TensorRT-LLM; accepted: strings without one."
            )
        if self.mismatch.needed and self.top_k:
            raise ConfigError(
                f"{key}.top_k={self.top_k}: TensorRT-LLM's log-probs are then of the k tokens alone, and "
                f"{key}.mismatch.stop_above and .correct have nothing to compare; accepted: 0."
            )


@dataclass
class ActorConfig:
    """`actor`: passes over the policy besides the update itself."""

    logprob_micro_batch_size: int = 16
    """Sequences per forward pass when log-probs are computed without gradient."""
    logits_chunk: int = 1024
    """Tokens whose logits are in memory at once, in every pass for log-probs, forward and backward; the gradient's are
    computed anew. 0: those of a whole micro-batch, kept for the gradient."""
    offload_optimizer: bool = False
    """The optimizer's states wait in host memory from one update to the next; costs their way there and back."""
    sequence_packing: bool = False
    """Sequences of a micro-batch go through the model one after the other, without padding between them, as many as
    have the tokens of a padded one; in updates and log-probs. On a GPU by Transformer Engine's attention."""

    def check(self, key: str) -> None:
        check_range(f"{key}.logprob_micro_batch_size", self.logprob_micro_batch_size, at_least=1)
        check_range(f"{key}.logits_chunk", self.logits_chunk, at_least=0)


@dataclass
class PretrainedConfig:
    """`pretrained_checkpoint`: where the policy and the reference policy start."""

    restore_from_path: Optional[str] = None
    """The base model, a .nemo file or an extracted .nemo directory."""
