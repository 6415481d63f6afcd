"""Convert there and back and print how much memory it took: conversion_memory_worker.py HF OUT SMALL_HF.

Prints JSON: {"to_nemo": bytes, "to_hf": bytes}, what the process's resident memory rose by at its highest. SMALL_HF is
converted first, so that libraries are loaded before anything is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from tools import hf_to_nemo, nemo_to_hf

SHARD = 24 * 2**20


def status(name: str) -> int:
    """Bytes that the kernel says under `name`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def highest(work: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts at the present size
    work()
    return status("VmHWM")


def main() -> None:
    source, out, small = map(Path, sys.argv[1:])
    nemo_to_hf.convert(hf_to_nemo.convert(small, out / "small.nemo"), out / "small_back")
    before = status("VmRSS")
    facts = {
        "to_nemo": highest(lambda: hf_to_nemo.convert(source, out / "large.nemo", "bf16")) - before,
        "to_hf": highest(lambda: nemo_to_hf.convert(out / "large.nemo", out / "back", max_shard=SHARD)) - before,
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
