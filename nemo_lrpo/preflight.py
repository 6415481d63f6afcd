"""Can this run start here? Look before hours of queueing end in a typing error.

    python -m nemo_lrpo.preflight run_dir=results/run data.train=train.parquet ...    # as nemo_lrpo.train takes them
    srun --ntasks-per-node=1 python -m nemo_lrpo.preflight --gather DIR key=value ... # on every node of a job

Checks versions, imports, GPUs and memory against the planner's prediction, ports, directories, the configuration, the
model's tokenizer and vocabulary, disk, temporary files, and the reward server. Prints one table for all nodes, with
what to do about each failure. Exit codes: 0 the run can start, 1 it cannot. slurm/train.sbatch runs it before every
start.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_lrpo.checkup.finding import FAIL, PASS, SKIP, WARN, Finding, Findings, failed, print_table
from nemo_lrpo.checkup.gather import collect, leave
from nemo_lrpo.checkup.machine import (
    check_disk,
    check_gpus,
    check_host_memory,
    check_ports,
    check_run_dir,
    check_shared_memory,
    check_temporary,
    devices,
    node_name,
)
from nemo_lrpo.checkup.versions import check_versions
from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import compose, load_train_config
from nemo_lrpo.config.schema import TrainConfig

GATHER_TIMEOUT_S = 900.0
"""For the slowest node: a container may have to be unpacked there, and the reward server has to load its encoder."""
PORT_TRIES = 64
_ENGINE_MODULES = ("tensorrt_llm", "nemo.export.tensorrt_llm")


@dataclass(frozen=True)
class Prediction:
    """What a run needs, in bytes. `gpu` (reserve included) and `host` are of one rank; None where nothing is predicted.
    `checkpoint` and `export` are files."""

    gpu: int | None
    host: int | None
    checkpoint: int
    export: int


def check_node(config: TrainConfig | None, findings: Findings, options: argparse.Namespace) -> None:
    """Every check of this node; those of the run as a whole on the first one only."""
    first = options.rank == 0
    gpu = config is not None and config.trainer.get("accelerator") == "gpu"
    engine = config is not None and config.rollout.backend == "trt_llm"
    check_versions(findings, gpu=gpu, engine=engine)
    check_shared_memory(findings)
    if first:
        check_ports(findings, options.first_port, PORT_TRIES)
    if config is None:
        # A typing error is best known at once; imports take their time.
        return
    imported = _check_imports(findings, engine)
    check_run_dir(findings, Path(config.run_dir))
    prediction = None
    if imported:
        with findings.checking("layout", ConfigError):
            prediction = _check_layout(config, findings if first else Findings("", []))
    if prediction is not None:
        ranks = int(config.trainer["devices"])
        if gpu:
            check_gpus(findings, devices(), ranks, prediction.gpu)
        if prediction.host is not None:
            check_host_memory(findings, ranks * prediction.host)
        if first:
            loop, run_dir = config.loop, Path(config.run_dir)
            kept = loop.keep_checkpoints and loop.keep_checkpoints + loop.checkpoint.keep_best
            check_disk(findings, run_dir, prediction.checkpoint, kept, prediction.export)
        export = prediction.export if first and config.loop.export_nemo else 0
        check_temporary(findings, Path(str(config.pretrained_checkpoint.restore_from_path)), ranks, export)
    if imported and first:
        _check_prompts(config, findings)
    _check_rewards(config, findings, wait=options.gather is not None)


def _check_imports(findings: Findings, engine: bool) -> bool:
    """Import what training imports."""
    before = len(findings.all)
    with findings.checking("imports"):
        from nemo_lrpo.actor.platform import ensure_platform

        platform = ensure_platform()
        for module in ("nemo_lrpo.actor.actor", "nemo_lrpo.actor.setup", *(_ENGINE_MODULES if engine else ())):
            importlib.import_module(module)
        findings.add("imports", PASS, f"NeMo, NeMo-Aligner and Megatron-Core on {platform}")
    return all(finding.outcome == PASS for finding in findings.all[before:])


def _check_layout(config: TrainConfig, findings: Findings) -> Prediction | None:
    """The model against the configuration, and what both need. Raises ConfigError."""
    from nemo_aligner.utils.utils import load_checkpoint_model_config

    from nemo_lrpo.actor.setup import check_nemo_sections, data_parallel_size
    from nemo_lrpo.actor.tokenizer import open_tokenizer
    from nemo_lrpo.checkup.archive import embedding_rows

    check_nemo_sections(config)
    nemo = str(config.pretrained_checkpoint.restore_from_path)
    base = load_checkpoint_model_config(nemo)
    tensor, pipeline = (int(config.model[f"{name}_model_parallel_size"]) for name in ("tensor", "pipeline"))
    findings.add("layout", PASS, f"tensor {tensor} x pipeline {pipeline} x data {data_parallel_size(config)}")
    _check_lengths(config, base, findings)
    vocabulary = len(open_tokenizer(nemo))
    rows = embedding_rows(Path(nemo))
    _check_vocabulary(vocabulary, rows, int(base.get("make_vocab_size_divisible_by", 128)), tensor, findings)
    return predict(config, base, rows or vocabulary, findings)


def _check_vocabulary(vocabulary: int, rows: int | None, divisor: int, tensor: int, findings: Findings) -> None:
    """The tokenizer's ids against the rows of the embedding, and both against the padding at this layout.

    NeMo pads the vocabulary to a multiple of divisor * tensor; a model whose rows are not that cannot be loaded.
    """
    unit = divisor * tensor
    padded = -(-vocabulary // unit) * unit
    convert = "Convert the model again with tools/hf_to_nemo.py: it pads for every tensor parallel size."
    if rows is None:
        findings.add("vocabulary", WARN, f"{vocabulary} ids; the model does not say how many rows it has", convert)
    elif vocabulary > rows:
        what = f"the tokenizer has {vocabulary} ids, the model's embedding {rows} rows"
        findings.add("vocabulary", FAIL, what, "The tokenizer belongs to another model. " + convert)
    elif padded != rows:
        what = f"{vocabulary} ids are padded to {padded} at tensor_model_parallel_size={tensor}; the model has {rows}"
        findings.add("vocabulary", FAIL, what, convert)
    else:
        findings.add("vocabulary", PASS, f"{vocabulary} ids, {rows} rows")


def _check_lengths(config: TrainConfig, base: Any, findings: Findings) -> None:
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    room = int(base.get("max_position_embeddings") or base.get("encoder_seq_length") or 0)
    text = f"prompt.max_tokens + rollout.max_new_tokens = {longest}; positions of the model: {room or 'not stated'}"
    if room and longest > room:
        findings.add("lengths", FAIL, text, "Shorten one of the two.")
    else:
        findings.add("lengths", PASS, text)


def predict(config: TrainConfig, base: Mapping[str, Any], rows: int, findings: Findings) -> Prediction:
    """What the planner predicts for this configuration; what rules the layout out becomes a failure.

    base: the .nemo's model section. rows: of its embedding. A checkpoint holds weights, master weights and two moments
    of what is trained: 14 bytes a parameter in bfloat16, at most 16 in float32.
    """
    from nemo_lrpo.planning.parameters import adapter_parameters, total_parameters
    from nemo_lrpo.planning.recipes import plan_config, workload_of
    from nemo_lrpo.planning.shapes import from_nemo
    from nemo_lrpo.planning.timing import Hardware

    shape = from_nemo(base, rows)
    parameters = total_parameters(shape)
    single = str(config.trainer.get("precision")) in ("32", "32-true")
    work = workload_of(config)
    trained = parameters
    if work.lora_dim:
        trained = shape.layers * adapter_parameters(shape, 1, work.lora_targets, work.lora_dim)
    files = trained * (16 if single else 14), parameters * (4 if single else 2)
    if config.trainer.get("accelerator") != "gpu":
        return Prediction(None, None, *files)
    # Memory is held against what this node has, further on.
    endless = dataclasses.replace(
        Hardware(), memory=2**62, host_memory=2**62, gpus_per_node=int(config.trainer["devices"])
    )
    try:
        plan = plan_config(config, shape, endless)
    except ConfigError as error:
        findings.add("memory", WARN, f"not predicted: {error}", "Watch nvidia-smi in the first step.")
        return Prediction(None, None, *files)
    for problem in plan.problems:
        findings.add("layout", FAIL, problem, "tools/plan.py shows layouts that fit.")
    return Prediction(plan.memory.peak + endless.reserve, plan.memory.host, *files)


def _check_prompts(config: TrainConfig, findings: Findings) -> None:
    """Questions, chat template and language requests."""
    from nemo_lrpo.data.errors import DataError
    from nemo_lrpo.data.reader import read_prompts
    from nemo_lrpo.train import fitting, open_renderer

    with findings.checking("prompts", ConfigError, DataError):
        questions = fitting(config, open_renderer(config), read_prompts(config.data.train, config.data.languages))
        if config.loop.prompts_per_step > len(questions):
            what = f"{len(questions)} questions, trainer.lrpo.prompts_per_step={config.loop.prompts_per_step}"
            findings.add("prompts", FAIL, what, "Give more questions, or ask fewer per step.")
        else:
            findings.add("prompts", PASS, f"{len(questions)} questions, {len(config.data.languages)} languages")


def _check_rewards(config: TrainConfig, findings: Findings, wait: bool) -> None:
    """Whether the reward server answers this node, as the server that the run wants."""
    from nemo_lrpo.serving.client import RewardClient
    from nemo_lrpo.serving.errors import RewardError
    from nemo_lrpo.training.modes import build_mode

    absent = [
        value for _, value in config.reward.sources() if config.reward.endpoint is None and not Path(value).exists()
    ]
    if absent and not wait:
        findings.add("reward server", SKIP, f"not up: no {absent[0]}")
        return
    with findings.checking("reward server", RewardError, ConfigError), closing(RewardClient(config.reward)) as client:
        client.check_server(config.data.languages, config.mode.thought_in)
        identity = client.wait_until_ready(1.0)
        build_mode(config.mode, total_steps=0).check_service(identity)
        encoder = identity.get("encoder") or "none"
        findings.add("reward server", PASS, f"answers; encoder {encoder}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_lrpo.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", default="train", help="one of conf/; default train")
    parser.add_argument("--gather", type=Path, metavar="DIR", help="one task of srun on each node; tables meet in DIR")
    parser.add_argument("--first-port", type=int, default=15000, help="first port of the ranks' store; default 15000")
    parser.add_argument("overrides", nargs="*", help="key=value, as for nemo_lrpo.train")
    parser.add_argument("--versions-only", action="store_true", help="check what is installed, and nothing else")
    options = parser.parse_intermixed_args(arguments)
    options.rank = int(os.environ.get("SLURM_PROCID", "0")) if options.gather else 0
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if options.gather else 1

    findings = Findings(node_name(), [])
    if options.versions_only:
        check_versions(findings, gpu=True, engine=False)
        _report(findings.all, [findings.node], options)
        sys.exit(1 if failed(findings.all) else 0)
    config = None
    with findings.checking("configuration", ConfigError):
        config = load_train_config(_compose(options.config_name, options.overrides))
        findings.add("configuration", PASS, f"conf/{options.config_name}.yaml with {len(options.overrides)} overrides")
    check_node(config, findings, options)
    found, nodes = findings.all, [findings.node]
    if options.gather:
        place = options.gather / os.environ.get("SLURM_RESTART_COUNT", "0")
        leave(place, options.rank, findings.node, found)
        if options.rank == 0:
            found, nodes = collect(place, tasks, GATHER_TIMEOUT_S)
    _report(found, nodes, options)
    sys.exit(1 if failed(found) else 0)


def _report(found: list[Finding], nodes: list[str], options: argparse.Namespace) -> None:
    if options.rank == 0:
        print_table(found, nodes)
        bad = sum(finding.outcome == FAIL for finding in found)
        print(f"preflight: failures: {bad}; put them right first." if bad else "preflight: all is well.", flush=True)


def _compose(name: str, overrides: Sequence[str]) -> Any:
    from hydra.errors import HydraException

    try:
        return compose(name, overrides)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    main()
