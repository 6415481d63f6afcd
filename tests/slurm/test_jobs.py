"""slurm/train.sbatch on a real Slurm: two nodes on this machine."""

from __future__ import annotations

import json
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not
from training_runs import LANGUAGES, settings_for, write_questions

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
REWARDS = ("--", "~verifiers.similarity", "+verifiers.exact={kind: exact}", f"languages=[{','.join(LANGUAGES)}]")
"""A server without an encoder."""
PACED = {"LRPO_PREFLIGHT": "0", "LRPO_ENTRY": "paced_trainer"}
"""Environment of jobs whose trainer only counts."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no Slurm can be started here: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {
            "LRPO_HOME": str(ROOT),
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
        }
        yield cluster


def submit(
    cluster: Cluster, directory: Path, *options: str, train: tuple[str, ...], environment: dict[str, str] = PACED
) -> int:
    """Submit a run in `directory`; its job id."""
    output = f"--output={directory / 'job.log'}"
    directory.mkdir(exist_ok=True)
    exported = ",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())])
    arguments = (str(SCRIPT), f"run_dir={directory}", *train, *REWARDS)
    return int(cluster.call("sbatch", "--parsable", output, f"--export={exported}", *options, *arguments))


def until(condition: object, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def steps_of(cluster: Cluster, job: int) -> dict[str, str]:
    """Running steps of a job by name."""
    lines = cluster.call("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i %j").splitlines()
    return {name: step for step, name in (line.split() for line in lines)}


def steps_started(log: Path) -> dict[str, str]:
    """The srun commands that a job said it would run, by component."""
    return dict(re.findall(r"starting (\w+): (srun .*)", read(log)))


def test_two_jobs_at_once_and_a_reward_server_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    # One on both nodes and one on one of them, whose ports are taken before it starts.
    first = submit(cluster, tmp_path / "a", "--nodes=2", "--ntasks-per-node=1", train=("+steps=100000", "+save_s=2"))
    taken = 15000 + (first + 1) % 1000 * 16
    with ExitStack() as stack:
        for port in (taken, taken + 8):
            listener = stack.enter_context(socket.socket())
            listener.bind(("0.0.0.0", port))
            listener.listen()
        second = submit(cluster, tmp_path / "b", "--nodes=1", "--ntasks-per-node=2", train=("+steps=20",))
        assert second == first + 1
        jobs = {name: tmp_path / name / "slurm" / str(job) for name, job in (("a", first), ("b", second))}
        for directory in jobs.values():
            endpoint, token = directory / "reward.json", directory / "token"
            until(endpoint.exists, 60, read(directory / "reward-0.log"))
            assert [stat.S_IMODE(path.stat().st_mode) for path in (endpoint, token)] == [0o600, 0o600]
            assert len(token.read_text()) == 64
        ports = {name: json.loads((directory / "reward.json").read_text())["port"] for name, directory in jobs.items()}
        assert ports["b"] == taken + 9 and ports["a"] not in (ports["b"], taken + 8)
        assert cluster.wait(second).state == "COMPLETED"
    assert f"port {taken + 1}" in read(jobs["b"] / "train-0.log")
    assert read(tmp_path / "b" / "count.json") == "20"
    assert not (jobs["b"] / "token").exists() and not (jobs["b"] / "reward.json").exists()

    # The same run_dir again, while its job runs.
    third = submit(cluster, tmp_path / "a", "--nodes=1", "--ntasks-per-node=1", train=("+steps=1",))
    assert cluster.wait(third).state == "FAILED"
    assert f"RunDirInUse: job {first} writes to" in read(tmp_path / "a" / "job.log")

    until(lambda: "goes on after step 0" in read(jobs["a"] / "train-1.log"), 60, read(jobs["a"] / "train-0.log"))
    step = steps_of(cluster, first)["reward"]
    killed = time.monotonic()
    cluster.call("scancel", "--signal=KILL", step)
    job = cluster.wait(first)
    took = time.monotonic() - killed
    said = read(tmp_path / "a" / "job.log")
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 0)
    assert "RewardServerEnded: exit code 137; the run is saved" in said
    assert took < 20, f"{took:.0f} s\n{said}"
    # The save took two seconds, and was waited for.
    assert int(read(tmp_path / "a" / "count.json")) > 0


def test_a_trainer_that_fails_ends_the_job_with_its_words(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        cluster,
        tmp_path / "run",
        "--nodes=1",
        "--ntasks-per-node=1",
        train=("+steps=1", "+exit=3", "reward.endpoint=not.asked:1"),
    )
    assert (ended := cluster.wait(job)).state == "FAILED"
    said = read(tmp_path / "run" / "job.log")
    assert (ended.exit_code, ended.restarts) == (1, 0)
    assert "TrainerFailed: exit code 3" in said and "saved after step 1" in said


def test_a_job_that_is_cancelled_in_set_up_is_not_brought_back(cluster: Cluster, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    settings = {"LRPO_PYTHON": str(sleeper), "LRPO_PREFLIGHT": "1"}
    train = ("reward.endpoint=not.asked:1",)
    job = submit(cluster, tmp_path / "run", "--nodes=1", "--ntasks-per-node=1", train=train, environment=settings)
    log = tmp_path / "run" / "job.log"
    until(lambda: "starting preflight" in read(log), 30, read(log))
    cluster.call("scancel", str(job))
    until(lambda: not cluster.call("squeue", "-h", f"--jobs={job}", check=False), 30, read(log))
    assert (cluster.job(job).state, cluster.job(job).restarts) == ("CANCELLED", 0)
    assert "nothing is lost" in read(log) and "not requeued" in read(log)


def test_a_job_that_may_not_be_requeued_says_so(cluster: Cluster, tmp_path: Path) -> None:
    # With a reward server that somebody else looks after.
    train = ("+steps=100000", "+save_s=1", "reward.endpoint=not.asked:1")
    job = submit(cluster, tmp_path / "run", "--nodes=1", "--ntasks-per-node=1", train=train)
    log, logs = tmp_path / "run" / "job.log", tmp_path / "run" / "slurm" / str(job)
    until(lambda: "goes on after step 0" in read(logs / "train-0.log"), 60, read(log))
    cluster.call("scontrol", "update", f"jobid={job}", "requeue=0")
    # What Slurm does before a time limit (--signal=B:USR1@...).
    cluster.call("scancel", "--batch", "--signal=USR1", str(job))
    ended = cluster.wait(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 75, 0), read(log)
    assert "everything is saved" in read(log) and "RequeueRefused: submit the same job again" in read(log)
    assert int(read(tmp_path / "run" / "count.json")) > 0 and "reward" not in steps_started(log)


def test_a_preempted_job_of_two_components_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--nodes=1", "--ntasks=2", ":", "--nodes=1", "--ntasks=1")
    job = submit(cluster, tmp_path / "run", *options, train=("+steps=60", "+save_s=1"))
    log, logs = tmp_path / "run" / "job.log", tmp_path / "run" / "slurm" / str(job)
    until(lambda: "rank 1 goes on after step 0" in read(logs / "train-0.log"), 60, read(log))
    # What preemption does at first: it tells the tasks of all components, and not the batch script.
    cluster.call("scancel", "--signal=TERM", str(job))
    until(lambda: cluster.job(job).restarts == 1, 60, read(log))
    first = int(read(tmp_path / "run" / "count.json"))
    assert 0 < first < 60
    ended = cluster.wait(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), read(log)
    assert f"goes on after step {first};" in read(logs / "train-0.log")
    assert read(tmp_path / "run" / "count.json") == "60"
    said = read(log)
    # Which of the components ends first is chance; the reward server's end tells of the signal where it is the one.
    assert "TERM came" in said or "trainer ended with exit code 75" in said
    assert "the job is requeued" in said and "start 2" in said and "done: " in said
    assert "--het-group=1" in steps_started(log)["reward"] and "--het-group=0" in steps_started(log)["train"]
    # Nothing was killed on the way; that a requeue ends the job script is Slurm's to say.
    said = "".join(line for line in said.splitlines() if "DUE TO JOB REQUEUE" not in line)
    assert "killed" not in said and "error" not in said


def test_a_training_meets_its_time_limit_and_goes_on(cluster: Cluster, tiny_nemo: Path, tmp_path: Path) -> None:
    """The trainer itself, from submission over preflight, a time limit, its save and the requeue to the model."""
    run_dir, slow = tmp_path / "run", tmp_path / "slow"
    settings = settings_for(tiny_nemo, write_questions(tmp_path / "train.jsonl"), tmp_path / "set by the job")
    del settings["reward.endpoint_file"]
    settings |= {
        "trainer.lrpo.max_steps": 14,
        "trainer.lrpo.max_epochs": 5,
        "trainer.lrpo.save_interval": 0,
    }
    train = ("--config-name=demo", *(f"{key}={value}" for key, value in settings.items()))
    options = ("--time=30", "--signal=B:USR1@110", "--nodes=1", "--ntasks-per-node=1")
    slow.touch()
    job = submit(
        cluster, run_dir, *options, train=train, environment={"LRPO_ENTRY": "slow_steps", "SLOW_STEPS": str(slow)}
    )
    log, metrics = run_dir / "job.log", run_dir / "metrics.jsonl"
    until(lambda: read(metrics).count("\n") >= 2 or cluster.job(job).state == "FAILED", 300, "no step was done")
    assert cluster.job(job).state == "RUNNING", read(log)
    # Slurm counts in minutes, and looks every half a minute: what it takes to train is not known before.
    elapsed = time.time() - float(cluster.call("date", "+%s", "--date", cluster.job(job).fields["StartTime"]))
    cluster.call("scontrol", "update", f"jobid={job}", f"timelimit={int(elapsed + 50) // 60 + 1}")
    until(lambda: cluster.job(job).restarts == 1, 150, read(log))
    cluster.call("scontrol", "update", f"jobid={job}", "timelimit=30")
    slow.unlink()
    ended = cluster.wait(job, timeout=300)
    said = read(log)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), said
    assert "USR1 came" in said and "TIME LIMIT" not in said and "the job is requeued" in said
    assert said.count("preflight: all is well") == 2
    assert read(run_dir / "slurm" / str(job) / "train-0.log").count("Continuing after step") == 1
    steps = [json.loads(line)["step"] for line in read(metrics).splitlines()]
    assert steps == list(range(1, 15))
    assert (run_dir / "model.nemo").exists() and not (run_dir / "slurm" / "owner").exists()
