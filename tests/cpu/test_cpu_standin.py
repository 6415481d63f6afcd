"""The stand-in for CUDA, Apex and Transformer Engine. Whatever installs it runs in a process of its own."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lrpo import cpu
from nemo_lrpo.actor import platform
from nemo_lrpo.cpu import cuda, replacement, stubs
from nemo_lrpo.cpu.fused_adam import FusedAdam
from nemo_lrpo.cpu.replacement import Replacement, value

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "cpu_workers"


def run(command: list[str], **variables: str) -> str:
    """Standard output of a fresh process; fails with its errors."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


# Adam


def adam_pair(**options: Any) -> tuple[list[list[torch.nn.Parameter]], list[torch.optim.Optimizer]]:
    """FusedAdam and torch's AdamW over equal parameters in two groups."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (3, 2, 4), (1,)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    copies = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    optimizers: list[torch.optim.Optimizer] = []
    for kind, params in zip((FusedAdam, torch.optim.AdamW), copies, strict=True):
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3}]
        optimizers.append(kind(groups, **options))
    return copies, optimizers


def test_adam_equals_torch_adamw() -> None:
    copies, optimizers = adam_pair(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        grads = [torch.randn(param.shape, generator=generator) for param in copies[0]]
        for params, optimizer in zip(copies, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    for ours, theirs in zip(*copies, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-6)


def test_adam_counts_steps_by_group_and_resumes() -> None:
    copies, (optimizer, _) = adam_pair(lr=1e-2, weight_decay=0.1)
    params = copies[0]

    def step(of: list[torch.nn.Parameter], with_: torch.optim.Optimizer) -> None:
        for index, param in enumerate(of):
            param.grad = torch.full_like(param, 0.1 * (index + 1))
        with_.step()

    step(params, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert [group["step"] for group in state["param_groups"]] == [1, 1]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())

    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = FusedAdam([{"params": twins[:2]}, {"params": twins[2:]}])
    resumed.load_state_dict(state)
    step(params, optimizer)
    step(twins, resumed)
    assert resumed.param_groups[0]["step"] == 2
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"adam_w_mode": False}, {"bias_correction": False}])
def test_adam_refuses_other_optimizers(option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="AdamW only"):
        FusedAdam([torch.nn.Parameter(torch.zeros(1))], **option)


# The table and what it is applied to


@pytest.fixture
def victim() -> Iterator[types.ModuleType]:
    """A module to replace names in."""
    module = types.ModuleType("standin_victim")
    exec("class Inner:\n    def name(self):\n        return 'old'\n\nplain = 1", module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_replacement_reaches_modules_and_classes(victim: types.ModuleType) -> None:
    replacement.apply(
        (
            Replacement("standin_victim.plain", "module name", lambda original: original + 1),
            Replacement("standin_victim.Inner.name", "method", lambda original: lambda self: original(self) + "er"),
            Replacement("standin_victim.added", "new name", lambda original: original is None),
        )
    )
    assert (victim.plain, victim.Inner().name(), victim.added) == (2, "older", True)


def test_installed_package_is_never_replaced(victim: types.ModuleType) -> None:
    replacement.apply(
        (
            Replacement("standin_victim.plain", "numpy is installed", value(9), supplied_by=("absent", "numpy")),
            Replacement("standin_victim.Inner.name", "absent", value("new"), supplied_by=("no_such_package",)),
        )
    )
    assert victim.plain == 1 and victim.Inner.name == "new"


def test_target_without_a_module_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        replacement.apply((Replacement("no_such_package.name", "", value(0)),))


def cuda_literals() -> Iterator[tuple[str, str]]:
    """(function, place) of every call in NeMo, NeMo-Aligner and Megatron-Core with a device written out as 'cuda'."""
    nemo = Path(next(iter(importlib.util.find_spec("nemo").submodule_search_locations)))
    aligner = Path(next(iter(importlib.util.find_spec("nemo_aligner").submodule_search_locations)))
    megatron = Path(next(iter(importlib.util.find_spec("megatron").submodule_search_locations))) / "core"
    language = nemo / "collections" / "nlp"
    folders = [megatron, aligner, nemo / "core", nemo / "utils", language / "modules", language / "parts"]
    folders.append(language / "models" / "language_modeling")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "cuda" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            devices = [keyword.value for keyword in node.keywords if keyword.arg == "device"]
            if any("'cuda" in ast.unparse(device) for device in devices):
                yield ast.unparse(node.func), f"{path.relative_to(nemo.parent)}:{node.lineno}"


def test_every_function_called_with_a_cuda_device_is_in_the_table() -> None:
    table = {entry.target for entry in cuda.TORCH_REPLACEMENTS}
    found = list(cuda_literals())
    assert len(found) > 20, "the three libraries are read"
    uncovered = {
        f"{function} in {place}"
        for function, place in found
        # Half precision plugins and QLoRA are GPU-only features; module.to() ends in Tensor.to.
        if function.startswith("torch.") and function not in table
    }
    assert not uncovered


# Stubs


def test_stub_imports_and_fails_when_used() -> None:
    module = stubs.StubModule("tensorrt_llm", stubs.STUBBED["tensorrt_llm"][1])
    config = module.runtime.SamplingConfig
    assert not isinstance(object(), config)
    with pytest.raises(RuntimeError, match=r"TensorRT-LLM is not installed.*rollout\.backend=megatron.*SamplingConfig"):
        config(end_id=0)
    with pytest.raises(AttributeError):
        getattr(module, "__wrapped__")  # noqa: B009


# When it may be installed


def test_install_is_refused_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="this machine has a GPU"):
        cpu.install()


@pytest.mark.parametrize("function", ["install", "install_missing"])
def test_install_is_refused_after_nemo(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_aligner", types.ModuleType("nemo_aligner"))
    with pytest.raises(RuntimeError, match=f"{function} must run before .*nemo_aligner.*ensure_platform"):
        getattr(cpu, function)()


@pytest.mark.parametrize(
    ("gpu", "packages", "expected", "accelerator"),
    [
        (False, True, ["install"], "cpu"),
        (False, False, ["install"], "cpu"),
        (True, False, ["install_missing"], "gpu"),
        (True, True, [], "gpu"),
    ],
)
def test_platform_decides_by_gpu_and_packages(
    gpu: bool, packages: bool, expected: list[str], accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace() if packages else None)
    monkeypatch.setattr(cpu, "install", lambda: called.append("install"))
    monkeypatch.setattr(cpu, "install_missing", lambda: called.append("install_missing"))
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert platform.ensure_platform() == accelerator
    assert called == expected
    assert ("NVIDIA_PYTORCH_VERSION" in os.environ) == bool(expected)


def test_stand_in_for_cuda_is_not_loaded_by_importing_the_room() -> None:
    program = "import sys, nemo_lrpo.cpu, nemo_lrpo.actor.platform; print(*sys.modules)"
    loaded = run([sys.executable, "-c", program]).split()
    assert "nemo_lrpo.cpu.cuda" not in loaded and "megatron.core" not in loaded and "nemo" not in loaded


@pytest.mark.parametrize(
    ("variables", "threads"), [({"LOCAL_WORLD_SIZE": "2"}, 4), ({}, 8), ({"OMP_NUM_THREADS": "3"}, None)]
)
def test_processes_share_the_cores(
    variables: dict[str, str], threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, setting in variables.items():
        monkeypatch.setenv(name, setting)
    chosen: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cpu._share_cores()
    assert chosen == ([] if threads is None else [threads])


def test_only_known_noise_is_dropped() -> None:
    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord("nemo_logger", logging.WARNING, "", 0, message, None, None)

    assert not platform._is_news(record("The model: Actor() does not have field.name: tp_comm_split_ag in its cfg."))
    assert platform._is_news(record("The model: Actor() has no tokenizer"))


# Installed, in processes of its own


@pytest.fixture(scope="module")
def installed() -> dict[str, dict[str, Any]]:
    """What `install` and, as a machine with a GPU would call it, `install_missing` change."""
    reports = {}
    for name, arguments in (("install", []), ("install_missing", ["--missing"])):
        output = run([sys.executable, str(WORKERS / "names_worker.py"), *arguments], NVIDIA_PYTORCH_VERSION="none")
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        reports[name] = json.loads(line.removeprefix("RESULT "))
    return reports


@pytest.mark.slow
def test_table_is_exactly_what_changes(installed: dict[str, dict[str, Any]]) -> None:
    report, control = installed["install"], installed["install_missing"]
    assert len(report["table"]) == len(set(report["table"]))
    assert sorted(report["table"]) == report["changed"]
    # Importing NeMo changes torch.compile and torch.manual_seed by itself; the control shows that.
    by_us = set(report["torch_changed"]) - set(control["torch_changed"])
    assert by_us == {entry.target for entry in cuda.TORCH_REPLACEMENTS}
    assert report["changed_by_second_call"] == []
    assert report["stubs"] == sorted(stubs.STUBBED)


@pytest.mark.slow
def test_only_names_of_apex_are_new(installed: dict[str, dict[str, Any]]) -> None:
    from nemo_lrpo.cpu import apex

    assert set(installed["install"]["new_names"]) <= {entry.target for entry in apex.REPLACEMENTS}


@pytest.mark.slow
def test_with_a_gpu_cuda_is_left_alone(installed: dict[str, dict[str, Any]]) -> None:
    report = installed["install_missing"]
    assert not report["cuda_room_loaded"]
    assert not [name for name in report["changed"] if name.startswith("torch.")]
    assert "megatron.core.optimizer.Adam" in report["changed"]
    assert "megatron.core.tensor_parallel.random._set_cuda_rng_state" not in report["changed"]


@pytest.mark.slow
def test_names_behave(installed: dict[str, dict[str, Any]]) -> None:
    behaviour = installed["install"]["behaviour"]
    assert [check for check, holds in behaviour.items() if not holds] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("tensorrt_llm", "RuntimeError: TensorRT-LLM is not installed; generate with Megatron"),
        ("exporter", "RuntimeError: TensorRT-LLM is not installed; generate with Megatron"),
        ("te layers", "ValueError: model.name='megatron_falcon_gpt', model.fp8=False need Transformer Engine"),
        ("apex adam", "RuntimeError: optim.name=distributed_fused_adam needs Apex"),
        ("apex norm", "RuntimeError: FusedLayerNorm needs Apex"),
    ],
)
def test_absent_features_fail_by_name(installed: dict[str, dict[str, Any]], attempt: str, message: str) -> None:
    assert installed["install"]["stub_errors"][attempt].startswith(message)


# An actor from end to end


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["one question, one answer, one language"] * 10, trainer)
    marks = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def launch(mode: str, workdir: Path, experiment: Path, processes: int, **layout: int) -> dict[str, Any]:
    """Run the worker under torchrun; returns what rank 0 wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = experiment.with_suffix(".json")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(WORKERS / "standin_worker.py")]
    command += [mode, str(workdir), str(experiment), str(result)]
    run(command + [f"--{name}={size}" for name, size in layout.items()])
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A working directory with a saved model and a training checkpoint of one process, and what that process saw."""
    workdir = tmp_path_factory.mktemp("standin")
    make_tokenizer(workdir / "tokenizer")
    return workdir, launch("build", workdir, workdir / "built", 1)


@pytest.mark.slow
def test_one_process_trains(built: tuple[Path, dict[str, Any]]) -> None:
    workdir, seen = built
    assert (seen["accelerator"], seen["backend"], seen["optimizer"]) == ("cpu", "gloo", "McoreDistributedOptimizer")
    assert (workdir / "base.nemo").exists()
    assert list((workdir / "built" / "checkpoints").glob("*step=1*/common.pt"))
    assert seen["first"][1] > 0.0, "gradient norm"
    assert not torch.allclose(torch.tensor(seen["saved"]), torch.tensor(seen["trained"]), atol=1e-2), "weights moved"
    assert seen["steps"] == [2, 2]
    assert seen["compiled"] == []
    assert "model-parallel-rng" in seen["random_states"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2, "pipeline": 1}, {"tensor": 1, "pipeline": 2}, {"tensor": 1, "pipeline": 1}],
    ids=["TP=2", "PP=2", "DP=2"],
)
def test_two_processes_continue_what_one_began(built: tuple[Path, dict[str, Any]], layout: dict[str, int]) -> None:
    workdir, alone = built
    experiment = workdir / "tp{tensor}-pp{pipeline}".format(**layout)
    shutil.copytree(workdir / "built" / "checkpoints", experiment / "checkpoints")
    seen = launch("resume", workdir, experiment, 2, **layout)

    assert "step=1" in seen["resumed_from"]
    for moment in ("saved", "trained", "after"):
        torch.testing.assert_close(torch.tensor(seen[moment]), torch.tensor(alone[moment]), rtol=0.0, atol=1e-4)
    assert seen["second"] == pytest.approx(alone["second"], rel=1e-4), "loss and gradient norm of the next step"
    assert seen["steps"] == alone["steps"]
    assert seen["rollouts"][0] == seen["rollouts"][1]
    assert list((experiment / "checkpoints").glob("*step=2*/common.pt"))
