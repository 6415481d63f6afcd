"""What a rank tells torch, from what srun tells it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from launch import ROOT

from nemo_lrpo import rank
from nemo_lrpo.rank import MeetingError, await_published, open_store, publish, rank_environment
from nemo_lrpo.training import stopping

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    # The whole job's, where the reward server has a task of its own.
    "SLURM_NTASKS": "17",
}


def test_ranks_are_those_of_the_step() -> None:
    found = rank_environment(SRUN, "node1", 15016)
    assert {key: found[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
    }
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "15016")
    assert found["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_outside_of_srun_and_on_uneven_nodes_it_says_so() -> None:
    with pytest.raises(MeetingError, match="SLURM_PROCID is not set; start this module with srun"):
        rank_environment({key: value for key, value in SRUN.items() if key != "SLURM_PROCID"}, "h", 1)
    with pytest.raises(MeetingError, match="15 ranks on 2 nodes"):
        rank_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "15"}, "h", 1)


def test_the_store_steps_over_ports_that_are_taken() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        store = open_store(taken, tries=20)
        assert taken < store.port < taken + 20
        # It is the store that holds the port, from then on.
        with pytest.raises(OSError):
            stack.enter_context(socket.socket()).bind(("0.0.0.0", store.port))
        with pytest.raises(MeetingError, match=f"no port from {taken} to {taken} can be bound.*LRPO_PORT_BASE"):
            open_store(taken, tries=1)


def test_a_rank_waits_for_what_the_first_one_publishes(tmp_path: Path) -> None:
    path = tmp_path / "meet.json"
    timer = threading.Timer(0.3, publish, (path, "node1", 15017))
    timer.start()
    assert await_published(path, 10) == ("node1", 15017)
    with pytest.raises(MeetingError, match="did not appear within 0 s. The first rank has not started"):
        await_published(tmp_path / "other.json", 0.3)


def test_the_entry_point_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "nemo_lrpo.rank", "--meet", ".", "nemo_lrpo.train"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "MeetingError: SLURM_JOB_ID is not set; start this module with srun.\n",
    )


def test_trainer_rank_and_job_script_mean_the_same_exit_code() -> None:
    script = (ROOT / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    assert rank.EXIT_REQUEUE == stopping.EXIT_REQUEUE
    assert f"readonly EXIT_REQUEUE={rank.EXIT_REQUEUE}\n" in script
