"""What a training step needs on each GPU, and which parallel layouts fit, ranked by predicted step time.

    python tools/plan.py --model llama3.1-70b --nodes 8
    python tools/plan.py --model qwen2.5-7b --gpus 4 rollout.max_new_tokens=4096
    python tools/plan.py --recipe llama3.1-8b trainer.num_nodes=2

--model is a name (--list shows them), a Hugging Face directory, or a .nemo that hf_to_nemo.py or training wrote. Other
arguments are overrides of conf/train.yaml: questions, lengths, engine. Layouts are searched over tensor and pipeline
sizes, micro-batches and recomputation. With --recipe the layout is that of conf/recipes, and the exit code is 1 where
it does not fit. Memory is arithmetic that the tests hold against Megatron-Core; times are predictions from a datasheet
and assumed shares of it (nemo_lrpo/planning/timing.py), good for an order and not for a promise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.config.checks import ConfigError  # noqa: E402
from nemo_lrpo.config.loader import compose, read_train_config  # noqa: E402
from nemo_lrpo.config.schema import TrainConfig  # noqa: E402
from nemo_lrpo.planning.layouts import Plan, rank_layouts  # noqa: E402
from nemo_lrpo.planning.memory import GIB, Memory  # noqa: E402
from nemo_lrpo.planning.parameters import total_parameters  # noqa: E402
from nemo_lrpo.planning.recipes import plan_config, workload_of  # noqa: E402
from nemo_lrpo.planning.shapes import CATALOGUE, ModelShape, from_huggingface, from_nemo  # noqa: E402
from nemo_lrpo.planning.timing import Hardware, StepTime  # noqa: E402

_ELSEWHERE = ("run_dir", "pretrained_checkpoint.restore_from_path", "data.train", "reward.endpoint_file")
"""Keys of a run that a plan does not need."""


def read_config(overrides: Sequence[str]) -> TrainConfig:
    """conf/train.yaml with overrides, whose files need not exist. Raises ConfigError."""
    given = {override.split("=")[0].lstrip("+") for override in overrides}
    filled = [f"{key}=-" for key in _ELSEWHERE if key not in given]
    try:
        return read_train_config(compose("train", [*filled, *overrides]))
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def read_shape(model: str) -> ModelShape:
    """The shape of a model by name, Hugging Face directory or .nemo. Raises ConfigError where it is none of them."""
    if model in CATALOGUE:
        return CATALOGUE[model]
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.name == "config.json" and file.is_file():
        return from_huggingface(json.loads(file.read_text(encoding="utf-8")))
    if not path.exists():
        raise ConfigError(f"--model {model}: neither a name ({', '.join(CATALOGUE)}) nor a path.")
    return _nemo_shape(path)


def _nemo_shape(path: Path) -> ModelShape:
    # Reading its table of tensors takes torch, which nothing else here does.
    from tools.conversion.archive import NemoArchive
    from tools.conversion.errors import ConversionError
    from tools.conversion.shards import ShardReader

    try:
        with NemoArchive(path) as archive, archive.open("model_config.yaml") as file:
            config = OmegaConf.to_container(OmegaConf.create(file.read().decode()), resolve=True)
            assert isinstance(config, dict)
            rows = ShardReader(archive).shape("embedding.word_embeddings.weight")[0]
    except ConversionError as error:
        raise ConfigError(str(error)) from error
    return from_nemo({str(key): value for key, value in config.items()}, rows)


def show(plans: Sequence[Plan], console: Console) -> None:
    """Two tables: memory of each plan in GiB, and seconds of its step."""
    names = [field.name for field in dataclasses.fields(Memory)]
    parts = [name for name in names if any(getattr(plan.memory, name) for plan in plans)]
    memory = _table("GiB on a GPU, the most of any stage; host: of a GPU's share of the node", [*parts])
    times = [field.name for field in dataclasses.fields(StepTime)]
    seconds = _table("predicted seconds of a step", [*times, "total"])
    for number, plan in enumerate(plans, 1):
        cells = _layout_cells(number, plan)
        memory.add_row(*cells, *(f"{getattr(plan.memory, name) / GIB:.1f}" for name in parts))
        seconds.add_row(*cells, *(f"{getattr(plan.time, name):.1f}" for name in (*times, "total")))
    console.print(memory)
    console.print(seconds)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    for name in ("#", "tp", "pp", "dp", "mb", "gen", "recompute", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name == "recompute" else "right", no_wrap=False)
    return table


def _layout_cells(number: int, plan: Plan) -> list[str]:
    layout = plan.layout
    sizes = (number, layout.tensor, layout.pipeline, layout.data, layout.micro_batch, layout.rollout_batch)
    return [*map(str, sizes), layout.recompute]


def _as_json(plan: Plan) -> dict[str, object]:
    time = {**dataclasses.asdict(plan.time), "total": plan.time.total}
    return {**dataclasses.asdict(plan), "time": time}


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--help` describes it."""
    hardware = Hardware()
    parser = argparse.ArgumentParser(
        description="Memory on each GPU and predicted step time of parallel layouts.",
        epilog="tp, pp, dp: tensor, pipeline and data parallel sizes; mb: model.micro_batch_size; gen: "
        "rollout.micro_batch_size; recompute: model.activations_checkpoint_granularity (full: uniform, 1 layer).",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a name, a Hugging Face directory or a .nemo")
    what.add_argument("--recipe", help="a file of conf/recipes, without .yaml")
    what.add_argument("--list", action="store_true", help="print the known models with their parameters")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of --gpus-per-node GPUs (default 1)")
    parser.add_argument("--gpus", type=int, help="GPUs in all, in place of --nodes")
    parser.add_argument("--gpus-per-node", type=int, default=hardware.gpus_per_node, help="default %(default)s")
    parser.add_argument(
        "--memory-gib", type=float, default=hardware.memory / GIB, help="of a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=hardware.reserve / GIB,
        help="left to CUDA, NCCL and the allocator (default %(default)s)",
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="as model.sequence_parallel=true")
    parser.add_argument(
        "--answer-tokens", type=int, metavar="N", help="of an answer on average, for actor.sequence_packing=true"
    )
    parser.add_argument("--top", type=int, default=10, help="layouts shown (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of conf/train.yaml")
    options = parser.parse_intermixed_args(arguments)
    hardware = dataclasses.replace(
        hardware,
        gpus_per_node=options.gpus_per_node,
        memory=int(options.memory_gib * GIB),
        reserve=int(options.reserve_gib * GIB),
    )
    console = Console(width=None if sys.stdout.isatty() else 190)
    answer_tokens = options.answer_tokens
    try:
        if options.list:
            for name, shape in CATALOGUE.items():
                console.print(f"{name:14} {total_parameters(shape) / 1e9:6.2f} billion parameters")
            return
        if options.recipe:
            config = read_config([f"+recipes={options.recipe}", *options.overrides])
            shape = read_shape(options.recipe.removesuffix("-lora"))
            plans = [plan_config(config, shape, hardware, answer_tokens)]
        else:
            gpus = options.gpus or options.nodes * hardware.gpus_per_node
            config = read_config(options.overrides)
            work = workload_of(config, answer_tokens)
            shape = read_shape(options.model)
            plans = rank_layouts(shape, gpus, work, hardware, sequence_parallel=options.sequence_parallel)
            if not plans:
                raise ConfigError(
                    f"no layout of {options.model} fits on {gpus} GPUs; give more nodes, shorter lengths or --sequence-"
                    "parallel, or see `--recipe` for what a layout lacks."
                )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    plans = plans[: options.top]
    if options.json:
        print(json.dumps([_as_json(plan) for plan in plans], indent=2))
    else:
        show(plans, console)
        if config.actor.sequence_packing and answer_tokens is None:
            console.print(
                "Times are those of answers of full length; --answer-tokens says what packing leaves of them."
            )
    problems = [problem for plan in plans for problem in plan.problems]
    if problems:
        sys.exit("\n".join(f"does not fit: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
