"""From a composed YAML tree to checked dataclasses; every refusal names the key and what is accepted."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from nemo_lrpo.config.checks import ConfigError, unknown_key_message
from nemo_lrpo.config.evaluation import needs_reward_server
from nemo_lrpo.config.mode import EXPLANG
from nemo_lrpo.config.schema import EvaluateConfig, OfflineConfig, RunConfig, TrainConfig
from nemo_lrpo.config.supervised import SupervisedConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
"""The shipped YAML files."""

RUN_CONFIG = "config.yaml"
"""In a run_dir: the whole configuration of the run, as it was started last."""

_OPEN_SECTIONS = ("trainer", "model", "exp_manager")

T = TypeVar("T")


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The shipped configuration `conf/<name>.yaml` with command-line style overrides applied."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
        return hydra_compose(config_name=name, overrides=list(overrides))


def to_dataclass(schema: type[T], node: Mapping[str, Any] | DictConfig | None, key: str = "") -> T:
    """`node` as an instance of the dataclass `schema`.

    Raises ConfigError for an unknown key (nearest known names given), a value of the wrong type or a mandatory value
    left at `???`. Values are not checked for meaning here: `schema.check` does that.
    """
    tree = OmegaConf.create({}) if node is None else node
    if not isinstance(tree, DictConfig):
        tree = OmegaConf.create(dict(tree))
    _refuse_unknown(schema, tree, key)
    _refuse_missing(tree, key)
    try:
        defaults = OmegaConf.structured(schema)
        _empty_given_mappings(schema, defaults, tree)
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(defaults, tree)))
    except OmegaConfBaseException as error:
        where = ".".join(part for part in (key, error.full_key) if part)
        raise ConfigError(f"{where}: {error.msg.splitlines()[0] if error.msg else error}.") from error


def load_train_config(tree: DictConfig) -> TrainConfig:
    """`conf/train.yaml` with overrides, typed and checked. Raises ConfigError before any work starts."""
    config = _load(TrainConfig, tree)
    check_train_config(config)
    return config


def save_run_config(tree: DictConfig, run_dir: str) -> None:
    """Write `tree`, interpolations resolved, to `run_dir`/config.yaml."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(tree, resolve=True)
    (Path(run_dir) / RUN_CONFIG).write_text(text, encoding="utf-8")


def read_train_config(tree: DictConfig) -> TrainConfig:
    """`conf/train.yaml` with overrides, typed but not checked: for planning a run whose files are elsewhere."""
    return _load(TrainConfig, tree)


def load_evaluate_config(tree: DictConfig) -> EvaluateConfig:
    """`conf/evaluate.yaml` with overrides, typed and checked. Raises ConfigError before any work starts."""
    config = _load(EvaluateConfig, tree)
    for name in ("mode", "prompt", "rollout", "actor", "evaluation"):
        getattr(config, name).check(name)
    config.loop.stop.check("trainer.lrpo.stop")
    if config.evaluation.think_in is not None and config.mode.name != EXPLANG:
        raise ConfigError(
            f"evaluation.think_in={config.evaluation.think_in!r} needs mode=explang, and mode.name="
            f"{config.mode.name!r}; give mode=explang, or null."
        )
    if needs_reward_server(config.evaluation.all_tasks()):
        config.reward.check("reward")
    run = config_of_run(Path(config.evaluation.checkpoint)) if config.evaluation.checkpoint else None
    if run is not None:
        if not config.pretrained_checkpoint.restore_from_path:
            config.pretrained_checkpoint.restore_from_path = run.pretrained_checkpoint.restore_from_path
        # Of a run with adapters a checkpoint has these alone.
        config.model["peft"] = OmegaConf.to_container(run.model.peft)
    _check_base_model(config)
    _check_trainer(config)
    return config


def load_offline_config(tree: DictConfig) -> OfflineConfig:
    """`conf/train_offline.yaml` with overrides, typed and checked. Raises ConfigError before any work starts."""
    config = _load(OfflineConfig, tree)
    for name in ("data", "method", "prompt", "rollout", "actor"):
        getattr(config, name).check(name)
    config.loop.check("trainer.lrpo")
    _check_base_model(config)
    _check_trainer(config)
    if config.rollout.backend != "megatron":
        raise ConfigError(f"rollout.backend={config.rollout.backend!r}: nothing is generated; accepted: 'megatron'.")
    validates = (config.data.validation or config.data.validation_share) and config.loop.val_check_interval
    _check_validation_metric(config, bool(validates), "data.validation or data.validation_share")
    return config


def load_policy_config(tree: DictConfig) -> EvaluateConfig:
    """`conf/evaluate.yaml` with overrides, typed and checked but for what is asked and who scores: for a policy that
    only answers. Raises ConfigError."""
    config = _load(EvaluateConfig, tree)
    for name in ("prompt", "rollout", "actor"):
        getattr(config, name).check(name)
    _check_base_model(config)
    _check_trainer(config)
    return config


def load_supervised_config(tree: DictConfig) -> SupervisedConfig:
    """`conf/train_sft.yaml` with overrides, typed and checked. Raises ConfigError before any work starts."""
    config = _load(SupervisedConfig, tree, "sft")
    for name in ("data", "prompt", "marks"):
        getattr(config, name).check(name)
    config.loop.check("trainer.sft")
    _check_base_model(config)
    _check_trainer(config)
    return config


def train_config_tree(config: TrainConfig) -> dict[str, Any]:
    """`config` as plain values in the layout of conf/train.yaml; `restore_train_config` reads it."""
    tree = dataclasses.asdict(config)
    tree["trainer"] = {**tree["trainer"], "lrpo": tree.pop("loop")}
    return tree


def restore_train_config(tree: Mapping[str, Any]) -> TrainConfig:
    """What `train_config_tree` wrote, typed but not checked: its files may have gone since. Raises ConfigError."""
    return _load(TrainConfig, OmegaConf.create(dict(tree)))


C = TypeVar("C", bound=RunConfig | SupervisedConfig)


def _load(schema: type[C], tree: DictConfig, loop: str = "lrpo") -> C:
    """loop: the section of `trainer` that is ours."""
    try:
        OmegaConf.resolve(tree)
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {error.msg}.") from error
    _refuse_missing(tree, "")
    closed = {field.name for field in dataclasses.fields(schema) if field.init and field.name != "loop"}
    trainer = OmegaConf.to_container(tree.get("trainer") or OmegaConf.create({}))
    assert isinstance(trainer, dict)
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {"loop": to_dataclass(hints["loop"], trainer.pop(loop, None), f"trainer.{loop}")}
    for key in tree:
        name = str(key)
        if name not in closed:
            raise ConfigError(unknown_key_message(name, closed, "configuration"))
        node = tree._get_node(name)
        if name in _OPEN_SECTIONS:
            values[name] = trainer if name == "trainer" else OmegaConf.to_container(tree[name])
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = to_dataclass(hints[name], typing.cast(DictConfig, node), name)
        else:
            values[name] = tree[name]
    return schema(**values)


def check_train_config(config: TrainConfig) -> None:
    """Check every section, then the rules that span sections."""
    for name in ("mode", "data", "prompt", "router", "rollout", "reward", "algorithm", "actor", "evaluation"):
        getattr(config, name).check(name)
    config.loop.check("trainer.lrpo")
    config.router.check_read("router")
    _check_base_model(config)
    _check_trainer(config)
    if config.router.reserved_slots > config.loop.rollouts_per_prompt:
        raise ConfigError(
            f"router.reserved_slots={config.router.reserved_slots} exceeds "
            f"trainer.lrpo.rollouts_per_prompt={config.loop.rollouts_per_prompt}; a group has only that many slots."
        )
    _check_groups(config)
    _check_mode(config)
    _check_engine(config)
    _check_best_metric(config)
    if config.evaluation.interval == 0 and config.evaluation.tasks:
        raise ConfigError(
            "evaluation.interval=0 never asks evaluation.tasks; give a number of steps, or take them out."
        )
    if config.loop.progress_timeout_s <= config.reward.deadline_s:
        raise ConfigError(
            f"trainer.lrpo.progress_timeout_s={config.loop.progress_timeout_s:g} must exceed "
            f"reward.deadline_s={config.reward.deadline_s:g}, for which a rank may wait for its scores."
        )
    rows = config.loop.prompts_per_step * config.loop.rollouts_per_prompt
    if config.loop.prompts_per_step % config.algorithm.num_updates:
        raise ConfigError(
            f"algorithm.num_updates={config.algorithm.num_updates} must divide "
            f"trainer.lrpo.prompts_per_step={config.loop.prompts_per_step} (a step has {rows} rollouts; a group is "
            "never split over two updates)."
        )


def _check_groups(config: TrainConfig) -> None:
    """What the router does to a group against the size of the group."""
    rollouts, per_prompt = config.router.rollouts, config.loop.rollouts_per_prompt
    if rollouts.adaptive and not rollouts.min <= per_prompt <= rollouts.max:
        raise ConfigError(
            f"router.rollouts.min={rollouts.min} to max={rollouts.max} must hold "
            f"trainer.lrpo.rollouts_per_prompt={per_prompt}, the mean size of a group."
        )
    if rollouts.adaptive and config.algorithm.num_updates > 1:
        raise ConfigError(
            f"algorithm.num_updates={config.algorithm.num_updates} does not go with router.rollouts.adaptive=true "
            "(updates of equal size would split groups of unequal size); accepted: 1."
        )
    largest = rollouts.max if rollouts.adaptive else per_prompt
    cap, count = config.router.diversity.max_per_language, len(config.data.languages)
    free = max(largest - config.router.reserved_slots, 0)
    if cap and free > (count - 1) * cap + max(cap - config.router.reserved_slots, 0):
        raise ConfigError(
            f"router.diversity.max_per_language={cap} with {count} languages cannot fill groups of {largest}; raise it."
        )
    least = config.router.diversity.min_languages
    if least > count:
        raise ConfigError(f"router.diversity.min_languages={least} exceeds the {count} languages of data.languages.")


def _check_mode(config: TrainConfig) -> None:
    """What the router is asked for in explang against the group, and what it does there."""
    mode, per_prompt = config.mode, config.loop.rollouts_per_prompt
    if mode.name != EXPLANG:
        return
    if mode.forced_rollouts > per_prompt:
        raise ConfigError(
            f"mode.forced_rollouts={mode.forced_rollouts} exceeds trainer.lrpo.rollouts_per_prompt={per_prompt}; a "
            "group has only that many rollouts."
        )
    if 0 < mode.forced_rollouts < config.router.reserved_slots:
        raise ConfigError(
            f"router.reserved_slots={config.router.reserved_slots} exceeds "
            f"mode.forced_rollouts={mode.forced_rollouts}, in which they count; lower it (0: the router draws all)."
        )
    if config.router.rollouts.adaptive:
        raise ConfigError("router.rollouts.adaptive=true is not for mode=explang; accepted: false.")


def _check_engine(config: TrainConfig) -> None:
    """What TensorRT-LLM is built for against what it will get."""
    rollout = config.rollout
    if rollout.backend != "trt_llm":
        return
    if config.prompt.max_tokens > rollout.trt_llm.max_input_len:
        raise ConfigError(
            f"rollout.trt_llm.max_input_len={rollout.trt_llm.max_input_len} is below "
            f"prompt.max_tokens={config.prompt.max_tokens}; the engine must take the longest prompt."
        )
    staged = config.model["pipeline_model_parallel_size"] > 1 and not rollout.trt_llm.reshard
    if rollout.mismatch.needed and staged:
        raise ConfigError(
            "rollout.mismatch.stop_above and .correct need log-probs, which TensorRT-LLM does not bring back from its "
            "last pipeline stage; set rollout.trt_llm.reshard=true (or model.pipeline_model_parallel_size=1)."
        )


def _check_best_metric(config: TrainConfig) -> None:
    """A metric of the validation, or of a task, needs one."""
    loop, name = config.loop, config.loop.checkpoint.best_metric
    if loop.checkpoint.keep_best and name.startswith("evaluation/"):
        if not config.evaluation.interval or name.split("/")[1].partition(".")[0] not in config.evaluation.tasks:
            raise ConfigError(
                f"trainer.lrpo.checkpoint.best_metric={name!r} needs that task in evaluation.tasks, and "
                "evaluation.interval > 0; set them, or choose a metric of training such as reward."
            )
    validates = config.data.validation and loop.val_check_interval
    _check_validation_metric(config, bool(validates), "data.validation")


def _check_validation_metric(config: RunConfig, validates: bool, source: str) -> None:
    loop = config.loop
    if loop.checkpoint.keep_best and loop.checkpoint.best_metric.startswith("validation/") and not validates:
        raise ConfigError(
            f"trainer.lrpo.checkpoint.best_metric={loop.checkpoint.best_metric!r} needs {source} and "
            "trainer.lrpo.val_check_interval > 0; set them, or choose a metric of training."
        )


def config_of_run(checkpoint: Path) -> DictConfig | None:
    """The configuration that the run of `checkpoint` (a run_dir, or a checkpoint in one) has left; None without one."""
    for run_dir in (checkpoint, *checkpoint.absolute().parents[:2]):
        if (run_dir / RUN_CONFIG).is_file():
            return typing.cast(DictConfig, OmegaConf.load(run_dir / RUN_CONFIG))
    return None


def _check_base_model(config: RunConfig | SupervisedConfig) -> None:
    path = config.pretrained_checkpoint.restore_from_path
    if not path or not Path(path).exists():
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={path!r}: no such file or directory; give a .nemo "
            "(tools/hf_to_nemo.py makes one from a Hugging Face directory)."
        )


def _check_trainer(config: RunConfig | SupervisedConfig) -> None:
    if config.seed < 1:
        raise ConfigError(f"seed={config.seed}: NeMo seeds its own draws with it, too; accepted: 1 or more.")
    if str(config.trainer.get("precision")) in {"16", "16-mixed", "fp16"}:
        raise ConfigError("trainer.precision: fp16 is not supported; accepted: bf16, bf16-mixed, 32.")
    for name in ("context_parallel_size", "expert_model_parallel_size", "virtual_pipeline_model_parallel_size"):
        if config.model.get(name) not in (None, 1):
            raise ConfigError(f"model.{name}={config.model[name]!r} is not supported; accepted: 1.")


def _refuse_unknown(schema: Any, node: DictConfig, key: str) -> None:
    hints = typing.get_type_hints(schema)
    for name in node:
        where = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise ConfigError(unknown_key_message(str(name), hints, key or "configuration"))
        child = node._get_node(name)
        if not isinstance(child, DictConfig) or child._is_missing() or child._is_none():
            continue
        if dataclasses.is_dataclass(hints[name]):
            _refuse_unknown(hints[name], child, where)
        elif typing.get_origin(hints[name]) is dict and dataclasses.is_dataclass(typing.get_args(hints[name])[1]):
            for entry in child:
                value = child._get_node(entry)
                if isinstance(value, DictConfig):
                    _refuse_unknown(typing.get_args(hints[name])[1], value, f"{where}.{entry}")


def _empty_given_mappings(schema: Any, defaults: DictConfig, node: DictConfig) -> None:
    """A mapping that is given replaces the default one: merged into it, no entry could ever be taken out."""
    for name, hint in typing.get_type_hints(schema).items():
        child = node._get_node(name) if name in node else None
        if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
            continue
        if typing.get_origin(hint) is dict:
            defaults[name] = {}
        elif dataclasses.is_dataclass(hint):
            _empty_given_mappings(hint, defaults[name], child)


def _refuse_missing(node: DictConfig, key: str) -> None:
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        names = [f"{key}.{name}" if key else name for name in missing]
        raise ConfigError(f"not set: {', '.join(names)}. Pass each as key=value on the command line.")
