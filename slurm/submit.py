#!/usr/bin/env python3
"""Check what a run needs, then submit it to Slurm.

    python slurm/submit.py --nodes 8 --time 4:00:00 --account me \\
        --container-image nemo_lrpo.sqsh --container-mounts /data:/data \\
        --reward encoder.path=/data/mmBERT --reward calibration.path=/data/calibration.json \\
        -- run_dir=/data/runs/70b pretrained_checkpoint.restore_from_path=/data/base.nemo data.train=/data/train.parquet

After `--`: overrides of conf/train.yaml (or --config-name=...); --reward: overrides of conf/serve_rewards.yaml. Paths
are checked before anything is submitted, and again by the preflight of the job. Runs on a login node: any Python from
3.8 on, nothing to install. A job that is requeued or submitted again goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "train.sbatch"
HOME_IN_CONTAINER = "/opt/nemo_lrpo"
"""Where Dockerfile puts the project."""
TRAIN_PATHS = {
    "pretrained_checkpoint.restore_from_path": "a .nemo; tools/hf_to_nemo.py makes one",
    "data.train": "parquet or JSONL",
    "data.validation": "parquet or JSONL, or null",
    "evaluation.data": "parquet or JSONL",
    "evaluation.checkpoint": "a run_dir, or a checkpoint in one",
    "prompt.chat_template": "a Jinja file, or null",
    "model.peft.restore_from_path": "a .nemo with adapters, or null",
    "reward.endpoint_file": "of a reward server that is up already, or leave it out",
    "reward.token_file": "or leave it out",
}
REWARD_PATHS = {
    "encoder.path": "directory of a sentence-transformers model",
    "calibration.path": "statistics from tools/calibrate.py, or --reward calibration.method=none",
    "language_id.path": "lid.176, or leave it out",
}
REQUIRED = ("pretrained_checkpoint.restore_from_path", "data.train")


class Submission:
    """A run as asked for: its overrides, its problems, its command. `problems` is empty for what can be submitted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.problems: list[str] = []
        self.train = [self._absolute(override, TRAIN_PATHS) for override in options.overrides]
        self.reward = [self._absolute(override, REWARD_PATHS) for override in options.reward]
        self._mounts = self._read_mounts()

    # -- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Collect all problems, each with its key and a remedy."""
        train, reward = _values(self.train), _values(self.reward)
        named_config = any(override.startswith("--config-name=") for override in self.train)
        given = {"reward.endpoint", "reward.endpoint_file"} & {k for k, v in train.items() if v != "null"}
        own_server = not given and not self.options.no_reward
        if "run_dir" not in train:
            self.problems.append("run_dir is not set: a directory for logs and checkpoints that all nodes share")
        else:
            self._check_run_dir(train["run_dir"])
        for key in REQUIRED:
            if key not in train and not named_config:
                self.problems.append(f"{key} is not set: {TRAIN_PATHS[key]}")
        self._check_paths(train, TRAIN_PATHS, "")
        self._check_paths(*_task_paths(train), "")
        if own_server:
            self._check_paths(reward, REWARD_PATHS, "--reward ")
            self._check_reward(reward)
        elif self.reward or self.options.reward_node:
            other = "reward.endpoint or reward.endpoint_file" if given else "--no-reward"
            self.problems.append(f"--reward and --reward-node do not go with {other}")
        self._check_container()
        if not self.options.dry_run and shutil.which("sbatch") is None:
            self.problems.append("no sbatch on this machine: run this on the cluster's login node, or with --dry-run")
        if not self.problems:
            self._check_configuration()

    def _check_reward(self, reward: dict[str, str]) -> None:
        if any(override.startswith("--config-name=") for override in self.reward):
            return
        similarity = "~verifiers.similarity" not in self.reward and "~verifiers" not in self.reward
        if similarity and "encoder.path" not in reward:
            self.problems.append(f"--reward encoder.path is not set: {REWARD_PATHS['encoder.path']}")
        if similarity and "calibration.path" not in reward and reward.get("calibration.method") != "none":
            self.problems.append(f"--reward calibration.path is not set: {REWARD_PATHS['calibration.path']}")

    def _check_paths(self, values: dict[str, str], keys: dict[str, str], option: str) -> None:
        for key, remedy in keys.items():
            value = values.get(key)
            if value in (None, "null", "") or value.startswith("["):
                continue
            host = self._on_host(value)
            if host is None:
                self.problems.append(f"{option}{key}={value} is not below a mount of --container-mounts")
            elif not host.exists():
                self.problems.append(f"{option}{key}={value}: no such file or directory; give {remedy}")

    def _check_run_dir(self, value: str) -> None:
        host = self._on_host(value)
        if host is None or str(host) != value:
            self.problems.append(f"run_dir={value} must have the same path inside the container: mount it so")
            return
        existing = next(path for path in (host, *host.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            self.problems.append(f"run_dir={value}: {existing} cannot be written")
        owner = host / "slurm" / "owner"
        if owner.exists() and shutil.which("squeue"):
            job = owner.read_text().strip()
            command = ["squeue", "--noheader", f"--jobs={job}", "--states=RUNNING,SUSPENDED,COMPLETING,PENDING"]
            if subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
                self.problems.append(f"run_dir={value}: job {job} writes there; wait for it or cancel it")

    def _check_container(self) -> None:
        image = self.options.container_image
        if image is None:
            return
        if (image.startswith(("/", ".")) or image.endswith(".sqsh")) and not Path(image).is_file():
            self.problems.append(f"--container-image={image}: no such file; `enroot import` makes one from a registry")

    def _check_configuration(self) -> None:
        """All keys, where Hydra is at hand; the job's preflight does it anyhow."""
        if self.options.container_image is not None:
            return
        sys.path.insert(0, str(ROOT))
        try:
            from nemo_lrpo.config.checks import ConfigError
            from nemo_lrpo.config.loader import (
                compose,
                load_evaluate_config,
                load_offline_config,
                load_train_config,
            )
        except ImportError:
            return
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--config-name", default="train")
        known, overrides = parser.parse_known_args(self.train)
        server = "reward.endpoint_file=reward.json"
        elsewhere = self.options.no_reward or any(override.startswith("reward.endpoint") for override in overrides)
        mine = [] if elsewhere else [server]
        try:
            tree = compose(known.config_name, [*mine, *overrides])
            if "method" in tree:
                load_offline_config(tree)
            elif "out" in (tree.get("evaluation") or {}).keys():
                load_evaluate_config(tree)
            else:
                load_train_config(tree)
        except ConfigError as error:
            self.problems.append(str(error))
        except Exception as error:
            if type(error).__module__.split(".")[0] != "hydra":
                raise
            self.problems.append(" ".join(str(error).split()))

    # -- paths ---------------------------------------------------------------------------------------------------

    def _absolute(self, override: str, paths: dict[str, str]) -> str:
        key, equals, value = override.partition("=")
        relative = key in (*paths, "run_dir") and value not in ("", "null") and value[0] not in "/["
        return f"{key}={Path(value).absolute()}" if equals and relative else override

    def _read_mounts(self) -> list[tuple[Path, Path]]:
        mounts = []
        for mount in filter(None, (self.options.container_mounts or "").split(",")):
            parts = mount.split(":")
            mounts.append((Path(parts[0]), Path(parts[1] if len(parts) > 1 else parts[0])))
            if not Path(parts[0]).exists():
                self.problems.append(f"--container-mounts: {parts[0]} does not exist")
        return mounts

    def _on_host(self, path: str) -> Path | None:
        """Where the container's `path` lies on this machine; None where no mount shows it."""
        if self.options.container_image is None:
            return Path(path)
        for source, target in sorted(self._mounts, key=lambda mount: len(mount[1].parts), reverse=True):
            if target in (Path(path), *Path(path).parents):
                return source / Path(path).relative_to(target)
        return None

    # -- commands ------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What the job script reads from its environment."""
        options = self.options
        settings = {"LRPO_HOME": str(ROOT)}
        if options.container_image is not None:
            settings = {"LRPO_HOME": options.home or HOME_IN_CONTAINER, "CONTAINER_IMAGE": options.container_image}
            if options.container_mounts:
                settings["CONTAINER_MOUNTS"] = options.container_mounts
        return {**settings, "LRPO_REWARD": "0"} if options.no_reward else settings

    def command(self) -> list[str]:
        """The sbatch command."""
        options = self.options
        run_dir = _values(self.train).get("run_dir", "")
        common = [f"--job-name={options.job_name}", f"--time={options.time}"]
        common += [f"--{name}={getattr(options, name)}" for name in ("account", "qos") if getattr(options, name)]
        partition = [f"--partition={options.partition}"] if options.partition else []
        ranks = options.gpus_per_node or 1
        gpus = [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
        train = [
            f"--nodes={options.nodes}",
            f"--ntasks={options.nodes * ranks}",
            f"--ntasks-per-node={ranks}",
            *gpus,
            *common,
            *partition,
            *options.sbatch,
        ]
        train += [f"--signal=B:USR1@{options.notice}", "--requeue", "--open-mode=append"]
        train += [f"--output={run_dir}/slurm/job-%j.log"]
        command = ["sbatch", "--parsable", *train]
        if options.reward_node:
            partition = [f"--partition={options.reward_partition}"] if options.reward_partition else partition
            gpus = [f"--gpus-per-node={options.reward_gpus}"] if options.reward_gpus else []
            command += [":", "--nodes=1", "--ntasks=1", *gpus, *common, *partition, *options.sbatch]
        rewards = ["--", *self.reward] if self.reward else []
        return [*command, str(SCRIPT), *self.train, *rewards]

    def steps(self) -> str:
        """What the job will start, as the job script says it."""
        options, job = self.options, "JOBID"
        counts = {"NODES": str(options.nodes), "TASKS": str(options.nodes * (options.gpus_per_node or 1))}
        dry = {
            "LRPO_DRY_RUN": "1",
            "SLURM_JOB_ID": "0",
            "SLURM_SUBMIT_DIR": str(Path.cwd()),
            "SLURM_JOB_NODELIST": job,
            "SLURM_JOB_NUM_NODES": counts["NODES"],
            "SLURM_NTASKS": counts["TASKS"],
            **({"SLURM_HET_SIZE": "2"} if options.reward_node else {}),
            "SLURM_JOB_NUM_NODES_HET_GROUP_0": counts["NODES"],
            "SLURM_NTASKS_HET_GROUP_0": counts["TASKS"],
        }
        arguments = self.command()
        arguments = arguments[arguments.index(str(SCRIPT)) :]
        environment = {**os.environ, **self.environment(), **dry}
        done = subprocess.run(["bash", *arguments], env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr


def _task_paths(values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Paths of evaluation.tasks.NAME={..., path: PATH, ...} by key, and what is to be given there."""
    tasks = {key: value for key, value in values.items() if key.startswith("evaluation.tasks.")}
    found = {f"{key}.path": re.search(r"path:\s*([^,}\s]+)", value) for key, value in tasks.items()}
    paths = {key: match.group(1) for key, match in found.items() if match}
    paths.update({key: value for key, value in tasks.items() if key.endswith(".path")})
    return paths, dict.fromkeys(paths, "a file of questions, or a directory of such files")


def _values(overrides: list[str]) -> dict[str, str]:
    return dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, with everything after `--` as `overrides`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="nodes that train; default 1")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs and ranks on each; 0: one rank without a GPU")
    add(
        "--time",
        default="4:00:00",
        help="time limit of one start; the run is requeued until it is done; default 4:00:00",
    )
    add("--notice", type=int, default=300, metavar="S", help="seconds before it when the trainer is told; default 300")
    add("--partition")
    add("--account")
    add("--qos")
    add("--job-name", default="lrpo")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="further option of sbatch; may be repeated")
    add("--reward", action="append", default=[], metavar="KEY=VALUE", help="override of the reward server's; repeat it")
    add("--reward-node", action="store_true", help="a node of its own for the reward server (heterogeneous job)")
    add("--no-reward", action="store_true", help="no reward server: an evaluation whose tasks are scored without one")
    add("--reward-partition", metavar="P", help="default: --partition")
    add("--reward-gpus", type=int, default=1, metavar="N", help="GPUs on that node; default 1")
    add("--container-image", metavar="IMAGE", help="for pyxis: a .sqsh file or a registry's image; default: none")
    add("--container-mounts", metavar="A:B,...", help="directories that the container sees")
    add("--home", help=f"the project inside the container; default {HOME_IN_CONTAINER}")
    add("--dry-run", action="store_true", help="check, print what would be submitted and started, submit nothing")
    add("overrides", nargs="*", metavar="-- KEY=VALUE", help="overrides of the training configuration")
    own, rest = arguments, []
    if "--" in arguments:
        own, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    options = parser.parse_args(own)
    options.overrides += rest
    return options


def main() -> None:
    """Entry point. Exit code 2 where something has to be put right first."""
    submission = Submission(parse(sys.argv[1:]))
    submission.check()
    if submission.problems:
        print("Not submitted:", *(f"  {problem}" for problem in submission.problems), sep="\n", file=sys.stderr)
        sys.exit(2)
    settings = [f"{key}={shlex.quote(value)}" for key, value in submission.environment().items()]
    print(*settings, shlex.join(submission.command()), flush=True)
    if submission.options.dry_run:
        print(submission.steps(), end="")
        return
    run_dir = Path(_values(submission.train)["run_dir"])
    (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **submission.environment()}
    done = subprocess.run(submission.command(), env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    job = done.stdout.strip().split(";")[0]
    print(f"Submitted job {job}. Its log: {run_dir}/slurm/job-{job}.log; those of its parts: {run_dir}/slurm/{job}/")


if __name__ == "__main__":
    main()
