"""slurm/submit.py: what it refuses, and what it would submit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

Run = subprocess.CompletedProcess[str]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Everything that a run needs, by key."""
    names = {
        "pretrained_checkpoint.restore_from_path": "base.nemo",
        "data.train": "train data.parquet",
        "encoder.path": "encoder",
        "calibration.path": "calibration.json",
    }
    paths = {key: tmp_path / name for key, name in names.items()}
    for path in paths.values():
        path.touch()
    return {key: str(path) for key, path in paths.items()}


def submit(*arguments: str, path: str | None = None, bare: bool = True) -> Run:
    """bare: without the environment's packages, as on a login node."""
    environment = {**os.environ, **({"PATH": path} if path else {})}
    command = [sys.executable, *(["-S"] if bare else []), str(ROOT / "slurm" / "submit.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def arguments_for(files: dict[str, str], run_dir: Path) -> tuple[list[str], list[str]]:
    rewards = [f"--reward={key}={files[key]}" for key in ("encoder.path", "calibration.path")]
    train = [f"{key}={files[key]}" for key in ("pretrained_checkpoint.restore_from_path", "data.train")]
    return rewards, ["--", f"run_dir={run_dir}", *train]


def steps(output: str) -> dict[str, list[str]]:
    """The srun commands of a dry run by component."""
    return {name: shlex.split(command) for name, command in re.findall(r"starting (\w+): (srun .*)", output)}


def test_everything_that_is_wrong_is_said_at_once(files: dict[str, str], tmp_path: Path) -> None:
    rewards, train = arguments_for(files, tmp_path / "run")
    Path(files["data.train"]).unlink()
    Path(files["encoder.path"]).unlink()
    image = ["--container-image=nowhere.sqsh", f"--container-mounts={tmp_path}"]
    done = submit("--dry-run", *image, *rewards, *train, "data.validation=/elsewhere/validation.parquet")
    assert (done.returncode, done.stdout) == (2, "")
    for words in (
        f"data.train={files['data.train']}: no such file or directory; give parquet or JSONL",
        f"--reward encoder.path={files['encoder.path']}: no such file",
        "--container-image=nowhere.sqsh: no such file; `enroot import`",
        "data.validation=/elsewhere/validation.parquet is not below a mount of --container-mounts",
    ):
        assert words in done.stderr
    done = submit("--dry-run", "--", "run_dir=/proc/nothing")
    for words in ("restore_from_path is not set", "data.train is not set", "--reward encoder.path is not set"):
        assert words in done.stderr


def test_a_dry_run_prints_every_command(files: dict[str, str], tmp_path: Path) -> None:
    rewards, train = arguments_for(files, tmp_path / "run")
    image = tmp_path / "image.sqsh"
    image.touch()
    options = ["--nodes=4", "--reward-node", f"--container-image={image}", f"--container-mounts={tmp_path}:{tmp_path}"]
    done = submit("--dry-run", "--time=8:00:00", "--account=me", *options, *rewards, *train, "rollout.backend=trt_llm")
    assert (done.returncode, done.stderr) == (0, "")
    sbatch = shlex.split(done.stdout.splitlines()[0])
    assert f"CONTAINER_IMAGE={image}" in sbatch and "LRPO_HOME=/opt/nemo_lrpo" in sbatch
    first, second = sbatch[: sbatch.index(":")], sbatch[sbatch.index(":") + 1 :]
    assert {"--nodes=4", "--ntasks=32", "--gpus-per-node=8", "--time=8:00:00", "--requeue"} <= set(first)
    assert {"--nodes=1", "--ntasks=1", "--gpus-per-node=1", "--account=me"} <= set(second)
    started = steps(done.stdout)
    assert list(started) == ["reward", "preflight", "train"]
    assert {"--het-group=0", "--ntasks=32", "--mpi=pmix", "--container-name=lrpo-0-train"} <= set(started["train"])
    assert {"--het-group=1", "--container-name=lrpo-0-reward"} <= set(started["reward"])
    assert {"--ntasks=4", "--ntasks-per-node=1", "--container-name=lrpo-0-train"} <= set(started["preflight"])
    assert {"trainer.num_nodes=4", "trainer.devices=8", f"data.train={files['data.train']}"} <= set(started["train"])
    assert f"encoder.path={files['encoder.path']}" in started["reward"]
    # What the user says comes last, and so holds.
    assert started["train"][-1] == "rollout.backend=trt_llm"
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"


def test_a_server_that_is_there_is_used(files: dict[str, str], tmp_path: Path) -> None:
    _, train = arguments_for(files, tmp_path / "run")
    started = steps(submit("--dry-run", *train, "reward.endpoint=rewards:8001", "reward.endpoint_file=null").stdout)
    assert list(started) == ["preflight", "train"]
    assert not any("reward.endpoint_file=/" in word for word in started["train"])
    rewards, _ = arguments_for(files, tmp_path / "run")
    done = submit("--dry-run", *rewards, *train, "reward.endpoint=rewards:8001")
    assert done.returncode == 2 and "--reward and --reward-node do not go with" in done.stderr


def test_a_relative_path_means_where_it_was_typed(files: dict[str, str], tmp_path: Path) -> None:
    rewards, train = arguments_for(files, tmp_path / "run")
    done = submit("--dry-run", *rewards, *train, "data.validation=README.md", "--config-name=demo")
    command = steps(done.stdout)["train"]
    assert f"data.validation={ROOT / 'README.md'}" in command
    # Hydra takes its own options before the overrides only.
    assert command.index("--config-name=demo") == command.index("nemo_lrpo.train") + 1


def test_what_is_submitted(files: dict[str, str], tmp_path: Path) -> None:
    """Against an sbatch that writes down how it was called."""
    said = tmp_path / "said"
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$LRPO_HOME" "$@" >{said}\necho 77\n')
    stand_in.chmod(0o755)
    rewards, train = arguments_for(files, tmp_path / "run")
    done = submit(*rewards, *train, path=f"{stand_in.parent}:/usr/bin:/bin")
    assert done.returncode == 0 and f"Submitted job 77. Its log: {tmp_path}/run/slurm/job-77.log" in done.stdout
    words = said.read_text().splitlines()
    assert words[0] == str(ROOT) and f"data.train={files['data.train']}" in words
    assert f"--output={tmp_path}/run/slurm/job-%j.log" in words and "--requeue" in words
    owner = tmp_path / "run" / "slurm" / "owner"
    owner.write_text("76\n")
    squeue = stand_in.with_name("squeue")
    squeue.write_text('#!/bin/sh\ncase "$*" in *--jobs=76*) echo 76 ;; esac\n')
    squeue.chmod(0o755)
    done = submit(*rewards, *train, path=f"{stand_in.parent}:/usr/bin:/bin")
    assert done.returncode == 2 and "job 76 writes there; wait for it or cancel it" in done.stderr
    owner.unlink()
    done = submit(*rewards, *train, path="/nowhere")
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr


def test_every_component_has_the_cpus_that_were_asked_for(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm says them by component in a heterogeneous job; srun does not take them over by itself."""
    rewards, train = arguments_for(files, tmp_path / "run")
    for variable, option in (("SLURM_CPUS_PER_TASK_HET_GROUP_0", ["--reward-node"]), ("SLURM_CPUS_PER_TASK", [])):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "7")
            started = steps(submit("--dry-run", *option, *rewards, *train).stdout)
        assert started and all("--cpus-per-task=7" in command for command in started.values()), variable


def test_an_evaluation_is_submitted_like_a_training(files: dict[str, str], tmp_path: Path) -> None:
    rewards, _ = arguments_for(files, tmp_path / "run")
    model, data = "pretrained_checkpoint.restore_from_path", files["data.train"]
    train = ["--config-name=evaluate", "+recipes=llama3.1-8b", f"run_dir={tmp_path}/run", f"{model}={files[model]}"]
    done = submit("--dry-run", *rewards, "--", *train, f"evaluation.data={data}", "evaluation.out=e.json", bare=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = submit("--dry-run", *rewards, "--", *train, "evaluation.data=/gone", "evaluation.out=e.json", bare=False)
    assert done.returncode == 2 and "evaluation.data=/gone: no such file" in done.stderr
    # What is scored in the job itself needs no server.
    task = f"+evaluation.tasks.math={{kind: mgsm, path: {tmp_path}}}"
    alone = submit("--dry-run", "--no-reward", "--", *train, task, "evaluation.out=e.json", bare=False)
    assert (alone.returncode, alone.stderr) == (0, "") and "LRPO_REWARD=0" in alone.stdout
    assert list(steps(alone.stdout)) == ["preflight", "train"]
    assert not any(word.startswith("reward.") for word in steps(alone.stdout)["train"])
    gone = ["evaluation.checkpoint=/gone", "+evaluation.tasks.care={kind: care, path: /nowhere}"]
    done = submit("--dry-run", "--no-reward", *rewards, "--", *train, task, *gone)
    missing = ("evaluation.checkpoint=/gone: no such file", "evaluation.tasks.care.path=/nowhere: no such file")
    for words in ("do not go with --no-reward", *missing):
        assert done.returncode == 2 and words in done.stderr


def test_keys_are_checked_where_hydra_is_at_hand(files: dict[str, str], tmp_path: Path) -> None:
    rewards, train = arguments_for(files, tmp_path / "run")
    assert submit("--dry-run", *rewards, *train, "router=uniform", bare=False).returncode == 0
    done = submit("--dry-run", *rewards, *train, "trainer.lrpo.max_stepz=3", bare=False)
    assert done.returncode == 2 and "trainer.lrpo.max_stepz" in done.stderr
    done = submit("--dry-run", *rewards, *train, "rollout.temperature=0", bare=False)
    assert done.returncode == 2 and "rollout.temperature=0" in done.stderr and "Traceback" not in done.stderr
