"""`evaluation`: which tasks measure a policy, during training and by nemo_lrpo.evaluate."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional

from nemo_lrpo.config.checks import ConfigError, check_choice, check_range
from nemo_lrpo.config.scoring import JudgeConfig, LanguageIdConfig

REWARD = "reward"
"""The verifier of a task that the reward server scores."""
VERIFIER_OF_KIND = {
    "reward": REWARD,
    "judge": "judge",
    "numeric": "numeric",
    "exact": "exact",
    "care": "judge",
    "care_pro": "judge",
    "mgsm": "numeric",
    "global_mmlu": "choice",
    "include": "choice",
}
"""What scores the answers of each kind of task, by verifier (rewards/build.py)."""
METHODS = ("logprob", "generate", "both")
CANDIDATES = ("letter", "text")
OWN = "question"
"""`think_in`: each question's own language."""


@dataclass
class TaskConfig:
    """`evaluation.tasks.NAME`: files of questions in one layout, and how their answers are scored."""

    kind: str = "reward"
    """Layout and scoring. reward: the training layout, scored by the reward server; judge, numeric, exact: the training
    layout, scored here by that verifier; care, care_pro, mgsm, global_mmlu, include: those public data sets' layouts
    (nemo_lrpo/tasks/layouts.py)."""
    path: Optional[str] = None
    """A file (.parquet, .jsonl, .json, .tsv), or a directory of them, with those of its directories."""
    language: Optional[str] = None
    """Of files whose rows do not name one; unset: from the name of the file, else of its directory (`Japanese-test`,
    `mgsm_de`, `de/test.parquet`)."""
    languages: List[str] = field(default_factory=list)
    """Questions in other languages are left out; empty: none are."""
    limit: int = 0
    """At most so many questions of each language, the first of the files; 0: all."""
    method: str = "logprob"
    """Multiple choice. logprob: the option to which the policy gives most probability; generate: the option that its
    answer picks; both: two tasks, NAME.logprob and NAME.generate."""
    candidates: str = "letter"
    """With logprob, what is compared. letter: the options' letters; text: their texts, log-probability by byte."""
    instruction: Optional[str] = None
    """Written under each question; unset: nothing, but for multiple choice a request for the letter, in the question's
    language where it is one of the 15 of the published run."""

    def check(self, key: str) -> None:
        check_choice(f"{key}.kind", self.kind, VERIFIER_OF_KIND)
        check_choice(f"{key}.method", self.method, METHODS)
        check_choice(f"{key}.candidates", self.candidates, CANDIDATES)
        check_range(f"{key}.limit", self.limit, at_least=0)
        if not self.path:
            raise ConfigError(f"{key}.path is not set; give a file of questions, or a directory of such files.")
        if not Path(self.path).exists():
            raise ConfigError(f"{key}.path={self.path!r}: no such file or directory; give the task's questions.")


def _identification() -> LanguageIdConfig:
    return LanguageIdConfig(gate="off")


@dataclass
class TasksConfig:
    """What is measured while a policy trains."""

    tasks: Dict[str, TaskConfig] = field(default_factory=dict)
    """By name."""
    interval: int = 20
    """During training: after every so many steps and after the last one; 0: never."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    samples: int = 1
    """Answers to each question, drawn apart. Above 1 pass@k is measured too; questions answered by log-prob have one
    answer all the same."""
    batch_size: int = 512
    """Answers generated at a time, over all ranks; what was answered before is kept."""
    unseen_languages: Optional[List[str]] = None
    """Languages counted as unseen in training; unset: those that are not among data.languages."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Behind tasks that a judge scores."""
    language_id: LanguageIdConfig = field(default_factory=_identification)
    """How the language of an answer is identified in tasks that are scored here. gate=off: a right answer in another
    language counts, and is counted apart; gate=response: it is worth nothing."""

    def check(self, key: str) -> None:
        for name, task in self.tasks.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ConfigError(f"{key}.tasks: {name!r} is no name; accepted: letters, digits, _ and -.")
            task.check(f"{key}.tasks.{name}")
        check_range(f"{key}.interval", self.interval, at_least=0)
        check_range(f"{key}.temperature", self.temperature, at_least=0.0)
        check_range(f"{key}.samples", self.samples, at_least=1)
        if self.samples > 1 and self.temperature == 0.0:
            raise ConfigError(
                f"{key}.samples={self.samples} with {key}.temperature={self.temperature}: greedy answers to a question "
                f"are all the same; give a temperature above 0, or {key}.samples=1."
            )
        check_range(f"{key}.batch_size", self.batch_size, at_least=1)
        self.language_id.check(f"{key}.language_id")
        if any(VERIFIER_OF_KIND[task.kind] == "judge" for task in self.tasks.values()):
            self.judge.check(f"{key}.judge")


@dataclass
class EvaluationConfig(TasksConfig):
    """What nemo_lrpo.evaluate measures besides, and where the result goes."""

    data: Optional[str] = None
    """Questions with references, parquet or JSONL as for training: a task of kind reward, named `test`."""
    out: str = "evaluation.json"
    """Metrics in all and by language; the answers go beside it as `<name>.jsonl`."""
    checkpoint: Optional[str] = None
    """A training checkpoint, `run_dir/checkpoints/step_N`, or a run_dir, whose newest is taken: its weights in place of
    the .nemo's. Without pretrained_checkpoint.restore_from_path the .nemo is the one that the run started from.
    model.peft is the run's; where its config.yaml is not in run_dir, give it."""
    think_in: Optional[str] = None
    """With mode=explang: the language that the policy is made to think in, an ISO 639-1 code; or question: that of each
    question. null: it chooses. The tag is prefilled; multiple choice by log-prob has none."""
    limit: int = 0
    """Of `data`: at most so many questions, the first of the file; 0: all."""
    overwrite: bool = False
    """Answers of another model, of other questions or settings at `out` are replaced, and those beyond `samples` left
    out; false: both are refused."""

    def check(self, key: str) -> None:
        super().check(key)
        check_range(f"{key}.limit", self.limit, at_least=0)
        if self.think_in not in (None, OWN) and not re.fullmatch("[a-z]{2}", self.think_in or ""):
            raise ConfigError(f"{key}.think_in={self.think_in!r} is none; accepted: a language such as de, or {OWN}.")
        if self.data is not None and TEST in self.tasks:
            raise ConfigError(f"{key}.tasks.{TEST}: {key}.data is the task of that name; give this one another.")
        if self.data is None and not self.tasks:
            raise ConfigError(
                f"{key}.data is not set, and {key}.tasks is empty; give the questions of one of them, for example "
                f"+{key}.tasks.mgsm={{kind: mgsm, path: mgsm}}."
            )
        if self.data is not None and not Path(self.data).exists():
            raise ConfigError(f"{key}.data={self.data!r}: no such file; give the parquet or JSONL file of questions.")

    def all_tasks(self) -> dict[str, TaskConfig]:
        """`tasks`, and before them what `data` stands for."""
        if self.data is None:
            return dict(self.tasks)
        return {TEST: TaskConfig(path=self.data), **self.tasks}


TEST = "test"
"""The name of the task that `data` is."""


def needs_reward_server(tasks: Dict[str, TaskConfig]) -> bool:
    """Whether any of `tasks` is scored by the reward server."""
    return any(VERIFIER_OF_KIND[task.kind] == REWARD for task in tasks.values())
