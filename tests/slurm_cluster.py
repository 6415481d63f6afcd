"""A real Slurm of two nodes on this machine, with munge, ports and directories of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "munged", "mungekey")
CREDENTIAL_S = 5
"""How long a credential lives; Slurm holds a requeued job back for as long."""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return f"needs root: slurmd starts tasks as other users, and this is {pwd.getpwuid(os.geteuid()).pw_name}"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge" if missing else None


@dataclass
class Job:
    """What Slurm says of a job."""

    state: str
    exit_code: int
    restarts: int
    fields: dict[str, str] = field(default_factory=dict)


class Cluster:
    """`with Cluster(directory) as cluster: cluster.submit(...)`."""

    def __init__(self, directory: Path, cpus: int = 8):
        self._directory = directory
        self._cpus = cpus
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(directory / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self._directory / "slurm.conf").exists() and len(self._processes) > 1:
            self.call("scancel", "--user=root", check=False)
            self._wait_for(lambda: not self.call("squeue", "-h", check=False).strip(), 20)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- what users do -------------------------------------------------------------------------------------------

    def call(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command against this cluster; its output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: int) -> Job:
        """The state of a job, ended ones included."""
        text = self.call("scontrol", "show", "job", "--oneliner", str(job_id))
        fields = dict(part.split("=", 1) for part in text.splitlines()[0].split() if "=" in part)
        return Job(fields["JobState"], int(fields["ExitCode"].split(":")[0]), int(fields["Restarts"]), fields)

    def wait(
        self, job_id: int, states: Sequence[str] = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), timeout: float = 120
    ) -> Job:
        """Wait until a job is in one of `states`; fails the test, with what Slurm knows of it, when it never is."""
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id)).state not in states:
            # Heterogeneous jobs wait for the backfill scheduler, which sleeps where nobody submits or ends anything.
            self.call("scontrol", "update", f"jobid={job_id}", "comment=waited for", check=False)
            assert time.monotonic() < deadline, f"job {job_id} is {job.state} after {timeout:.0f} s: {job.fields}"
            time.sleep(0.2)
        return job

    # -- set-up --------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        directory = self._directory
        for name in ("state", "spool/n1", "spool/n2", "log", "munge"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(3)
        nodes = "\n".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs={self._cpus} RealMemory=1000 "
            "State=UNKNOWN"
            for i in (1, 2)
        )
        (directory / "slurm.conf").write_text(
            f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire={CREDENTIAL_S}
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/ctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/log/ctld.log
SlurmdLogFile={directory}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
{nodes}
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
        )

    def _start(self) -> None:
        directory = self._directory
        munge = directory / "munge"
        key = munge / "key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=self.environment, check=True)
        files = [f"--{name}-file={munge / name}" for name in ("pid", "log", "seed")]
        self._spawn("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}", *files)
        self._wait_for((munge / "socket").exists, 10)
        self._spawn("slurmctld", "-D")
        self._wait_for(lambda: "UP" in self.call("scontrol", "ping", check=False), 20)
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        self._wait_for(lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", 20)

    def _spawn(self, *command: str) -> None:
        with (self._directory / "log" / f"{command[0]}{len(self._processes)}.out").open("wb") as log:
            self._processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _wait_for(self, condition: object, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():  # type: ignore[operator]
            logs = self._directory / "log"
            said = "\n".join(f"== {path.name}\n{path.read_text()[-800:]}" for path in sorted(logs.iterdir()))
            assert time.monotonic() < deadline, f"the cluster did not get ready in {timeout:.0f} s\n{said}"
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
