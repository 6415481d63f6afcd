"""Every shipped configuration is parsed and checked; mistakes are refused with a message that says what to do."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.evaluation import EvaluationConfig
from nemo_lrpo.config.loader import (
    CONFIG_DIR,
    compose,
    load_evaluate_config,
    load_offline_config,
    load_supervised_config,
    load_train_config,
    restore_train_config,
    save_run_config,
    train_config_tree,
)
from nemo_lrpo.config.mode import ModeConfig
from nemo_lrpo.config.schema import OfflineConfig, TrainConfig
from nemo_lrpo.config.supervised import SupervisedConfig
from nemo_lrpo.serve_rewards import load_config

METHODS = {"dpo": ("dpo", 2), "mapo": ("dpo", 2), "mpo": ("reward_gap", 4)}
"""Loss and answers of a pair, by the file's name."""
ROUTERS = sorted(path.stem for path in (CONFIG_DIR / "router").glob("*.yaml"))
TRT_LLM = {"rollout.backend": "trt_llm"}
POLICIES = {"default": "hierarchical", "spread": "hierarchical", "input_dominant": "fixed", "en_dominant": "fixed"}
"""Of the router files that are not named for theirs."""


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Files that a configuration must name; only their presence is checked at this stage."""
    for name in ("base.nemo", "train.parquet", "test.parquet", "reward.json"):
        (tmp_path / name).write_text("")
    return {
        "run_dir": str(tmp_path / "run"),
        "pretrained_checkpoint.restore_from_path": str(tmp_path / "base.nemo"),
        "data.train": str(tmp_path / "train.parquet"),
        "data.validation": "null",
        "reward.endpoint_file": str(tmp_path / "reward.json"),
    }


def overrides(paths: dict[str, str], **changes: str) -> list[str]:
    return [f"{key}={value}" for key, value in {**paths, **changes}.items()]


@pytest.mark.parametrize("name", ["train", "demo"])
@pytest.mark.parametrize("router", ROUTERS)
def test_shipped_training_configurations_are_valid(name: str, router: str, paths: dict[str, str]) -> None:
    config = load_train_config(compose(name, overrides(paths, router=router)))
    assert config.router.name == POLICIES.get(router, router)
    assert config.loop.rollouts_per_prompt == 8


@pytest.mark.parametrize("name", ["train", "demo"])
def test_the_mode_is_one_word(name: str, paths: dict[str, str]) -> None:
    assert load_train_config(compose(name, overrides(paths))).mode == ModeConfig()
    config = load_train_config(compose(name, overrides(paths, mode="explang")))
    assert config.mode == ModeConfig(name="explang"), "the file has the published values, which are the defaults"
    assert restore_train_config(train_config_tree(config)) == config


def test_the_demo_of_explang_is_valid(paths: dict[str, str]) -> None:
    config = load_train_config(compose("demo_explang", overrides(paths)))
    assert (config.mode.name, config.mode.forced_rollouts, len(config.mode.seen)) == ("explang", 0, 12)


@pytest.mark.parametrize("name", ["evaluate", "demo_evaluate"])
def test_shipped_evaluation_configurations_are_valid(name: str, paths: dict[str, str], tmp_path: Path) -> None:
    del paths["data.train"], paths["data.validation"], paths["run_dir"]
    paths |= {"evaluation.data": str(tmp_path / "test.parquet"), "evaluation.out": str(tmp_path / "out.json")}
    config = load_evaluate_config(compose(name, overrides(paths)))
    assert (config.evaluation.temperature, config.evaluation.samples) == (1.0, 1)


def test_the_evaluation_of_the_demo_of_explang_is_valid(paths: dict[str, str], tmp_path: Path) -> None:
    own = {"evaluation.tasks.sums.path": paths["data.train"], "evaluation.out": str(tmp_path / "out.json")}
    own |= {name: paths[name] for name in ("pretrained_checkpoint.restore_from_path", "reward.endpoint_file")}
    config = load_evaluate_config(compose("demo_explang_evaluate", overrides(own)))
    training = load_train_config(compose("demo_explang", overrides(paths)))
    assert (config.mode, config.rollout, config.prompt) == (training.mode, training.rollout, training.prompt)
    assert config.evaluation.data is None and config.evaluation.temperature == 0.0


def offline(paths: dict[str, str], **changes: str) -> list[str]:
    """Overrides of a training over pairs, of the same files."""
    names = ("run_dir", "pretrained_checkpoint.restore_from_path", "data.train")
    return overrides({name: paths[name] for name in names}, **changes)


def test_every_method_has_a_file() -> None:
    assert METHODS.keys() == {path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")}


@pytest.mark.parametrize("name", ["train_offline", "demo_offline"])
@pytest.mark.parametrize("method", METHODS)
def test_shipped_configurations_of_training_over_pairs_are_valid(
    name: str, method: str, paths: dict[str, str], tmp_path: Path
) -> None:
    tree = compose(name, offline(paths, method=method))
    config = load_offline_config(tree)
    assert (config.method.name, config.method.loss, config.method.rows_per_pair) == (method, *METHODS[method])
    assert config.rows_per_update == METHODS[method][1] * 64
    assert (config.algorithm.kl_coefficient, config.algorithm.aggregation) == (0.0, "sequence_mean")
    hints = typing.get_type_hints(OfflineConfig)
    sections = [(name, hints[name], tree[name]) for name in ("data", "method", "prompt", "actor")]
    sections.append(("trainer.lrpo", hints["loop"], tree.trainer.lrpo))
    assert not [key for name, schema, node in sections for key in missing_keys(schema, node, name)]
    save_run_config(tree, config.run_dir)
    assert load_offline_config(OmegaConf.load(tmp_path / "run" / "config.yaml")) == config


def test_a_recipe_is_of_use_to_training_over_pairs(paths: dict[str, str]) -> None:
    config = load_offline_config(compose("train_offline", ["+recipes=llama3.1-8b", *offline(paths)]))
    assert config.model["tensor_model_parallel_size"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method.beta": "0"}, ["method.beta", "> 0.0"]),
        ({"method.loss": "ipo"}, ["method.loss='ipo'", "'reward_gap'"]),
        ({"method.retention": "1"}, ["method.retention=1", "loss=reward_gap"]),
        ({"method": "mpo", "method.label_smoothing": "0.1"}, ["method.label_smoothing=0.1", "loss=dpo"]),
        ({"data.validation_share": "1"}, ["data.validation_share", "< 1.0"]),
        ({"data.train": "nowhere.jsonl"}, ["data.train='nowhere.jsonl'", "make_pairs"]),
        ({"data.validation": "{train}", "data.validation_share": "0.1"}, ["data.validation_share=0.1", "one of them"]),
        ({"trainer.lrpo.pairs_per_step": "0"}, ["trainer.lrpo.pairs_per_step=0", ">= 1"]),
        ({"trainer.lrpo.checkpoint.keep_best": "1"}, ["best_metric='validation/accuracy'", "data.validation_share"]),
        ({"+rollout.backend": "trt_llm"}, ["rollout.backend='trt_llm'", "'megatron'"]),
        ({"+algorithm.kl_coefficient": "0.1"}, ["unknown key 'algorithm'"]),
        ({"+router": "{name: uniform}"}, ["unknown key 'router'"]),
        ({"pretrained_checkpoint.restore_from_path": "nowhere.nemo"}, ["restore_from_path", "nowhere.nemo"]),
    ],
)
def test_mistakes_in_training_over_pairs_are_named(
    paths: dict[str, str], change: dict[str, str], words: list[str]
) -> None:
    change = {key: value.replace("{train}", paths["data.train"]) for key, value in change.items()}
    with pytest.raises(ConfigError) as refused:
        load_offline_config(compose("train_offline", offline(paths, **change)))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", ["serve_rewards", "demo_rewards"])
def test_shipped_server_configurations_are_valid(name: str, tmp_path: Path) -> None:
    for file in ("encoder/modules.json", "encoder/model.safetensors", "calibration.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    paths = {"encoder.path": str(tmp_path / "encoder"), "calibration.path": str(tmp_path / "calibration.json")}
    config = load_config(compose(name, overrides(paths)))
    assert config.calibration.method == "mean" and config.host == "127.0.0.1" and len(config.languages) == 15


@pytest.mark.parametrize("name", ["train_sft", "demo_sft"])
def test_shipped_configurations_of_the_cold_start_are_valid(name: str, paths: dict[str, str]) -> None:
    del paths["reward.endpoint_file"]
    tree = compose(name, overrides(paths))
    config = load_supervised_config(tree)
    assert config.model["peft"]["peft_scheme"] == "lora"
    hints = typing.get_type_hints(SupervisedConfig)
    sections = [(part, hints[part], tree[part]) for part in ("data", "prompt", "marks", "pretrained_checkpoint")]
    sections.append(("trainer.sft", hints["loop"], tree.trainer.sft))
    assert not [key for part, schema, node in sections for key in missing_keys(schema, node, part)]
    for change, words in (
        ({"trainer.sft.val_check_interval": "4", "trainer.sft.save_interval": "6"}, "must be a multiple of"),
        ({"+trainer.sft.max_step": "4"}, "unknown key 'max_step'. Did you mean 'max_steps'"),
        ({"data.train": "nowhere.jsonl"}, "data.train='nowhere.jsonl': no such file; .*make_traces.py"),
        ({"marks.thinking_open": "'<lang_select>'"}, "is part of marks"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_supervised_config(compose(name, overrides(paths, **change)))


def test_every_shipped_file_is_covered() -> None:
    """A file added to conf/ must be added to these tests."""
    top = {path.stem for path in CONFIG_DIR.glob("*.yaml")}
    assert top == {
        "train",
        "demo",
        "train_offline",
        "demo_offline",
        "evaluate",
        "demo_evaluate",
        "serve_rewards",
        "demo_rewards",
        "train_sft",
        "demo_sft",
        "demo_explang",
        "demo_explang_evaluate",
    }


def missing_keys(schema: type, node: DictConfig, key: str) -> list[str]:
    hints = typing.get_type_hints(schema)
    missing = []
    for field in dataclasses.fields(schema):
        if field.name not in node:
            missing.append(f"{key}.{field.name}")
        elif dataclasses.is_dataclass(hints[field.name]):
            missing += missing_keys(hints[field.name], node[field.name], f"{key}.{field.name}")
    return missing


@pytest.mark.parametrize("router", ROUTERS)
def test_every_key_can_be_overridden_without_a_plus(router: str, paths: dict[str, str]) -> None:
    tree = compose("train", overrides(paths, router=router))
    hints = typing.get_type_hints(TrainConfig)
    sections = [(name, hints[name], tree[name]) for name in ("data", "prompt", "router", "rollout", "reward")]
    names = ("algorithm", "actor", "pretrained_checkpoint", "evaluation")
    sections += [(name, hints[name], tree[name]) for name in names]
    sections.append(("trainer.lrpo", hints["loop"], tree.trainer.lrpo))
    sections.append(("mode", ModeConfig, compose("train", overrides(paths, mode="explang")).mode))
    assert not [key for name, schema, node in sections for key in missing_keys(schema, node, name)]


def test_every_key_of_an_evaluation_can_be_overridden_without_a_plus(tmp_path: Path) -> None:
    for name in ("evaluate", "demo_evaluate"):
        tree = compose(name, [f"evaluation.out={tmp_path / 'out.json'}"])
        assert not missing_keys(EvaluationConfig, tree.evaluation, "evaluation")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["evaluation.data is not set", "evaluation.tasks is empty", "+evaluation.tasks.mgsm"]),
        ({"+evaluation.tasks.a": "{kind: mgsm2, path: X}"}, ["evaluation.tasks.a.kind='mgsm2'", "'mgsm'"]),
        ({"+evaluation.tasks.a": "{kind: mgsm}"}, ["evaluation.tasks.a.path is not set"]),
        ({"+evaluation.tasks.a": "{kind: mgsm, path: nowhere}"}, ["evaluation.tasks.a.path='nowhere'", "no such file"]),
        ({"+evaluation.tasks.a": "{kin: mgsm, path: X}"}, ["evaluation.tasks.a", "'kin'", "'kind'"]),
        ({"+evaluation.tasks.a": "{kind: care, path: X}"}, ["evaluation.judge.url"]),
        ({"+evaluation.tasks.a": "{kind: reward, path: X}"}, ["reward.endpoint_file"]),
        ({"+evaluation.tasks": "{a b: {kind: mgsm, path: X}}"}, ["'a b' is no name"]),
        ({"evaluation.data": "X", "evaluation.think_in": "de"}, ["evaluation.think_in='de'", "mode=explang"]),
        (
            {"evaluation.data": "X", "mode": "explang", "evaluation.think_in": "German"},
            ["think_in='German'", "question"],
        ),
        ({"evaluation.data": "X", "+evaluation.tasks.test": "{kind: mgsm, path: X}"}, ["evaluation.tasks.test"]),
        ({"evaluation.data": "X", "evaluation.samples": "0"}, ["evaluation.samples=0"]),
        (
            {"evaluation.data": "X", "evaluation.samples": "2", "evaluation.temperature": "0"},
            ["evaluation.samples=2", "evaluation.temperature=0.0"],
        ),
    ],
)
def test_mistakes_in_tasks_are_named(change: dict[str, str], words: list[str], tmp_path: Path) -> None:
    for name in ("base.nemo", "X"):
        (tmp_path / name).write_text("")
    settings = {
        "pretrained_checkpoint.restore_from_path": str(tmp_path / "base.nemo"),
        "evaluation.out": str(tmp_path / "out.json"),
        **{key: value.replace("X", str(tmp_path / "X")) for key, value in change.items()},
    }
    with pytest.raises(ConfigError) as refused:
        load_evaluate_config(compose("evaluate", [f"{key}={value}" for key, value in settings.items()]))
    for word in words:
        assert word in str(refused.value)


def test_what_scores_here_needs_no_reward_server(tmp_path: Path) -> None:
    (tmp_path / "base.nemo").write_text("")
    task = f"+evaluation.tasks.math={{kind: mgsm, path: {tmp_path}}}"
    paths = [f"pretrained_checkpoint.restore_from_path={tmp_path / 'base.nemo'}", f"evaluation.out={tmp_path}/o.json"]
    config = load_evaluate_config(compose("evaluate", [*paths, task]))
    assert config.reward.endpoint_file is None and config.evaluation.all_tasks().keys() == {"math"}


def test_the_defaults_are_the_published_settings(paths: dict[str, str]) -> None:
    """But for the router, whose published settings are one word away."""
    config = load_train_config(compose("train", overrides(paths, router="published")))
    assert (config.loop.prompts_per_step, config.loop.rollouts_per_prompt, config.loop.max_epochs) == (256, 8, 4)
    assert (config.router.reserved_slots, config.router.update_every, config.router.alpha) == (2, 5, 0.1)
    assert (config.router.temperature.init, config.router.temperature.min, config.router.temperature.decay) == (
        1.0,
        0.3,
        0.999,
    )
    assert (config.router.epsilon.init, config.router.epsilon.min, config.router.epsilon.decay) == (0.2, 0.0, 0.995)
    assert (config.router.name, config.router.normalisation) == ("published", "zscore")
    assert (config.algorithm.kl_coefficient, config.algorithm.num_updates) == (0.001, 1)
    assert (config.prompt.max_tokens, config.rollout.max_new_tokens, config.model["optim"]["lr"]) == (512, 1024, 1e-6)
    assert len(config.data.languages) == 15


@pytest.mark.parametrize("name", ["train", "demo"])
def test_the_router_is_the_recommended_one_unless_another_is_asked_for(name: str, paths: dict[str, str]) -> None:
    plain, asked = (load_train_config(compose(name, overrides(paths, **more))) for more in ({}, {"router": "default"}))
    assert plain.router == asked.router
    assert (plain.router.name, plain.router.epsilon.min, plain.router.diversity.min_languages) == (
        "hierarchical",
        0.005,
        2,
    )


def test_the_configuration_that_a_run_leaves_is_the_one_it_had(paths: dict[str, str], tmp_path: Path) -> None:
    tree = compose("demo", overrides(paths, router="ucb", seed="7"))
    config = load_train_config(tree)
    save_run_config(tree, config.run_dir)
    assert load_train_config(OmegaConf.load(tmp_path / "run" / "config.yaml")) == config


def test_a_checkpoint_is_measured_with_the_base_and_the_adapters_of_its_run(
    paths: dict[str, str], tmp_path: Path
) -> None:
    lora = {"model.peft.peft_scheme": "lora", "model.peft.lora_tuning.adapter_dim": "5"}
    tree = compose("train", overrides(paths, **lora))
    save_run_config(tree, paths["run_dir"])
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    asked = [f"evaluation.out={tmp_path / 'out.json'}", f"evaluation.data={tmp_path / 'test.parquet'}"]
    asked += [f"evaluation.checkpoint={checkpoint}", f"reward.endpoint_file={paths['reward.endpoint_file']}"]
    config = load_evaluate_config(compose("evaluate", asked))
    assert config.pretrained_checkpoint.restore_from_path == paths["pretrained_checkpoint.restore_from_path"]
    assert config.model["peft"] == OmegaConf.to_container(tree.model.peft)
    assert config.model["peft"]["lora_tuning"]["adapter_dim"] == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout.temperature": "0"}, ["rollout.temperature", "> 0.0"]),
        ({"seed": "0"}, ["seed=0", "1 or more"]),
        ({"rollout.backend": "vllm"}, ["rollout.backend", "megatron", "trt_llm"]),
        ({"rollout.spread": "evenly"}, ["rollout.spread", "length", "plan"]),
        ({"rollout.mismatch.correct": "sequence"}, ["rollout.mismatch.correct", "truncated"]),
        ({"rollout.mismatch.stop_above": "0.1", "rollout.mismatch.log": "false"}, ["rollout.mismatch.log", "true"]),
        ({**TRT_LLM, "rollout.end_strings": "['a,b']"}, ["rollout.end_strings", "'a,b'", "comma"]),
        ({**TRT_LLM, "rollout.trt_llm.max_input_len": "64"}, ["max_input_len=64", "prompt.max_tokens=512"]),
        ({**TRT_LLM, "rollout.mismatch.stop_above": "0.1", "rollout.top_k": "5"}, ["rollout.top_k=5", "accepted: 0"]),
        (
            {**TRT_LLM, "rollout.mismatch.correct": "truncated", "model.pipeline_model_parallel_size": "2"},
            ["rollout.mismatch", "rollout.trt_llm.reshard=true"],
        ),
        ({"algorithm.aggregation": "mean"}, ["algorithm.aggregation", "token_mean"]),
        ({"mode": "explang", "mode.forced_rollouts": "9"}, ["mode.forced_rollouts=9", "rollouts_per_prompt=8"]),
        ({"mode": "explang", "mode.forced_rollouts": "1"}, ["router.reserved_slots=2", "mode.forced_rollouts=1"]),
        ({"mode": "explang", "router.rollouts.adaptive": "true"}, ["router.rollouts.adaptive", "mode=explang"]),
        ({"mode": "explang", "mode.exploration_share": "2"}, ["mode.exploration_share=2", "<= 1.0"]),
        ({"mode": "explang", "mode.name": "xplang"}, ["mode.name='xplang'", "'lrpo'", "'explang'"]),
        ({"+mode.exploration_share": "0.5"}, ["mode.exploration_share", "mode=explang"]),
        ({"router.reserved_slots": "9"}, ["router.reserved_slots=9", "rollouts_per_prompt=8"]),
        ({"router.rollouts.adaptive": "true", "router.rollouts.min": "9"}, ["rollouts.min=9", "rollouts_per_prompt=8"]),
        ({"router.rollouts.adaptive": "true", "algorithm.num_updates": "2"}, ["num_updates=2", "adaptive", ": 1"]),
        ({"router.diversity.min_languages": "16"}, ["min_languages=16", "15 languages"]),
        (
            {"router.diversity.max_per_language": "1", "data.languages": "[de,en,ja]"},
            ["max_per_language=1", "3 languages", "groups of 8"],
        ),
        ({"router.objective.name": "regret"}, ["router.objective.name='regret'", "'progress'"]),
        ({"router.price.unit": "euros"}, ["router.price.unit='euros'", "'tokens'", "'seconds'"]),
        ({"router": "uniform", "router.price.weight": "0.1"}, ["router.price", "uniform", "hierarchical"]),
        ({"router": "published", "router.ucb.exploration": "1"}, ["router.ucb.exploration=1.0", "'published'", "0.5"]),
        ({"router.hierarchical.sharpness": "2", "router": "ucb"}, ["router.hierarchical.sharpness=2.0", "'ucb'"]),
        ({"router.temperature.init": "2"}, ["router.temperature.init=2.0", "'hierarchical'", "router=published"]),
        ({"router": "uniform", "+router.prior": "{en: 1.0}"}, ["router.prior={'en': 1.0}", "'uniform'"]),
        ({"router": "monolingual", "router.diversity.min_languages": "2"}, ["router.diversity", "one language"]),
        ({"algorithm.num_updates": "3"}, ["algorithm.num_updates=3", "prompts_per_step=256"]),
        ({"trainer.lrpo.prompts_per_step": "many"}, ["trainer.lrpo.prompts_per_step", "many"]),
        ({"actor.logits_chunk": "-1"}, ["actor.logits_chunk=-1", ">= 0"]),
        (
            {
                "trainer.lrpo.checkpoint.keep_best": "1",
                "trainer.lrpo.checkpoint.best_metric": "evaluation/math/accuracy",
            },
            ["best_metric='evaluation/math/accuracy'", "evaluation.tasks"],
        ),
        ({"trainer.precision": "16-mixed"}, ["trainer.precision", "bf16"]),
        ({"model.tensor_model_parallel_size": "1", "prompt.style": "tags"}, ["prompt.style", "tag", "system"]),
        ({"pretrained_checkpoint.restore_from_path": "nowhere.nemo"}, ["restore_from_path", "nowhere.nemo"]),
        ({"data.train": "nowhere.parquet"}, ["data.train", "nowhere.parquet"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(paths: dict[str, str], change: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_train_config(compose("train", overrides(paths, **change)))
    for word in words:
        assert word in str(refused.value)


def test_a_misspelt_key_on_the_command_line_is_refused_by_hydra(paths: dict[str, str]) -> None:
    with pytest.raises(HydraException, match="max_stepz"):
        compose("train", [*overrides(paths), "trainer.lrpo.max_stepz=3"])


@pytest.mark.parametrize(
    ("key", "near"),
    [("rollout.temprature", "temperature"), ("trainer.lrpo.max_stepz", "max_steps"), ("algoritm", "algorithm")],
)
def test_a_misspelt_key_in_a_file_is_refused_with_the_nearest_known(paths: dict[str, str], key: str, near: str) -> None:
    tree = compose("train", overrides(paths))
    with open_dict(tree):
        OmegaConf.update(tree, key, 1)
    with pytest.raises(ConfigError, match=f"Did you mean.*'{near}'"):
        load_train_config(tree)


def test_what_is_not_set_is_named(paths: dict[str, str]) -> None:
    del paths["data.train"]
    with pytest.raises(ConfigError, match=r"not set: data\.train"):
        load_train_config(compose("train", overrides(paths)))


def test_a_mapping_that_is_given_replaces_the_default_one() -> None:
    tree = compose("serve_rewards", ["~verifiers.similarity", "+verifiers.math={kind: numeric}"])
    config = load_config(tree)
    assert list(config.verifiers) == ["math"] and config.verifiers["math"].kind == "numeric"
    aliases = load_config(compose("serve_rewards", ["~verifiers.similarity", "+verifiers.x={kind: exact}"]))
    assert aliases.language_id.aliases == {"arz": "ar", "wuu": "zh", "yue": "zh"}
    fewer = ["~verifiers.similarity", "+verifiers.x={kind: exact}", "~language_id.aliases.arz"]
    assert load_config(compose("serve_rewards", fewer)).language_id.aliases == {"wuu": "zh", "yue": "zh"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["+verifiers.math={kid: numeric}"], ["verifiers.math", "'kid'", "'kind'", "tolerance"]),
        (["+verifiers.math={kind: numerics}"], ["verifiers.math.kind='numerics'", "'numeric'"]),
        (["+verifiers.other={kind: similarity}"], ["2 of kind=similarity"]),
        (["~verifiers.similarity"], ["verifiers is empty"]),
        (["~verifiers.similarity", "+verifiers.f={kind: format}"], ["verifiers.f.pattern is not set"]),
        (["~verifiers.similarity", "+verifiers.f={kind: format, pattern: '('}"], ["no regular expression"]),
        (["~verifiers.similarity", "+verifiers.f={kind: exact, pattern: 'a'}"], ["no group"]),
        (["~verifiers.similarity", "+verifiers.j={kind: judge}"], ["judge.url"]),
        (["thinking.marks.thinking_open=''"], ["thinking.marks.thinking_open=''", "without white space"]),
        (["language_id.gate=maybe"], ["language_id.gate", "'share'"]),
        (["calibration.bounds=none"], ["calibration.bounds", "'rescale'"]),
    ],
)
def test_mistakes_in_scoring_are_named(change: list[str], words: list[str], tmp_path: Path) -> None:
    for file in ("encoder/modules.json", "encoder/model.safetensors", "calibration.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    paths = [f"encoder.path={tmp_path / 'encoder'}", f"calibration.path={tmp_path / 'calibration.json'}"]
    with pytest.raises(ConfigError) as error:
        load_config(compose("serve_rewards", [*paths, *change]))
    for word in words:
        assert word in str(error.value)
