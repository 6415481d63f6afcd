"""Start the project's processes as a user would, on loopback, and keep what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(arguments: Sequence[str], ranks: int = 1) -> list[str]:
    """`python arguments` for one rank, torchrun on a free port for several."""
    if ranks == 1:
        return [sys.executable, *arguments]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    return [sys.executable, *launcher, "--rdzv-endpoint=localhost:0", *arguments]


def run(
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    expect: int | None = 0,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr together in `.stdout`. Fails the test unless it exits with `expect`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(
        command(arguments, ranks),
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert expect is None or done.returncode == expect, f"exit {done.returncode}, expected {expect}\n{done.stdout}"
    return done
