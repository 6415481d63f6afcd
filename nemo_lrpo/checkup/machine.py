"""Devices, memory, ports, directories and disk of this node."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from nemo_lrpo.checkup.finding import FAIL, PASS, WARN, Findings

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NEEDED = GIB // 2


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its memory, all of it and what is free, in bytes."""

    name: str
    total: int
    free: int


def devices() -> list[Device]:
    """The GPUs that this process sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(torch.cuda.get_device_name(index), total, free))
    return found


def check_gpus(findings: Findings, found: list[Device], wanted: int, needed: int | None) -> None:
    """Enough GPUs, and on each room for `needed` bytes; None: nobody knows how many."""
    if len(found) < wanted:
        findings.add(
            "GPUs",
            FAIL,
            f"{len(found)} visible, trainer.devices={wanted}",
            "Ask Slurm for them (--gpus-per-node), look at CUDA_VISIBLE_DEVICES and at nvidia-smi on this node.",
        )
        return
    used = found[:wanted]
    total, free = min(device.total for device in used), min(device.free for device in used)
    what = f"{wanted} x {used[0].name}, {size(total)} each, {size(free)} free"
    if needed is None:
        findings.add("GPUs", PASS, what)
        return
    what += f", {size(needed)} needed on the fullest"
    if total < needed:
        remedy = "More model parallelism, a smaller micro-batch, recomputation: tools/plan.py shows layouts that fit."
        findings.add("GPUs", FAIL, what, remedy)
    elif free < needed:
        findings.add("GPUs", FAIL, what, "Another process is on them: nvidia-smi on this node.")
    else:
        findings.add("GPUs", PASS, what)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process's control groups allow (Slurm's --mem, a container's limit); None where none says."""
    limits = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            try:
                limits.append(int((top / place / name).read_text()))
            except (OSError, ValueError):
                continue  # "max", or a group that is not mounted here
    return min(limits, default=None)


def check_host_memory(findings: Findings, needed: int, available: int | None = None) -> None:
    """`needed` bytes of this node's memory against what is available."""
    if available is None:
        room = min(psutil.virtual_memory().available, memory_limit() or 2**62)
    else:
        room = available
    text = f"about {size(needed)} needed, {size(room)} available"
    if needed > room:
        remedy = (
            "Ask Slurm for more (--mem=0 takes all), or algorithm.kl_coefficient=0, which keeps no reference policy."
        )
        findings.add("host memory", FAIL, text, remedy)
    else:
        findings.add("host memory", PASS, text)


def check_shared_memory(findings: Findings, free: int | None = None) -> None:
    """NCCL and the reward server pass data through /dev/shm; containers may come with 64 MB of it."""
    if free is None:
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < SHARED_MEMORY_NEEDED:
        remedy = "docker run --shm-size=16g (or --ipc=host); enroot mounts the host's."
        findings.add("shared memory", WARN, f"{size(free)} free in {SHARED_MEMORY}", remedy)
    else:
        findings.add("shared memory", PASS, f"{size(free)} free in {SHARED_MEMORY}")


def check_ports(findings: Findings, first: int, tries: int) -> None:
    """Of the ports from `first` on, the one that the ranks would take."""
    for port in range(first, first + tries):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        stepped = "" if port == first else f"; {port - first} before it taken"
        findings.add("ports", PASS, f"{port} is free{stepped}")
        return
    remedy = "Set LRPO_PORT_BASE to a range that this cluster leaves to users."
    findings.add("ports", FAIL, f"none of {first} to {first + tries - 1} can be bound", remedy)


def check_run_dir(findings: Findings, run_dir: Path) -> None:
    """Whether this node can write there. Makes the directory."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".preflight-"):
            pass
    except OSError as error:
        remedy = "Give a directory that all nodes (and the container: CONTAINER_MOUNTS) can write."
        findings.add("run_dir", FAIL, f"{run_dir}: {error.strerror or error}", remedy)
    else:
        findings.add("run_dir", PASS, f"{run_dir} can be written")


def check_disk(
    findings: Findings, directory: Path, checkpoint: int, kept: int, export: int, free: int | None = None
) -> None:
    """Room for what a run leaves behind. All in bytes.

    checkpoint: size of one. kept: how many stay, 0 for all of them; one more is there while it is written. export: size
    of the final .nemo.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    room = shutil.disk_usage(existing).free if free is None else free
    needed = (kept + 1) * checkpoint + export if kept else 2 * checkpoint + export
    text = f"{size(room)} free; {kept or 1} checkpoints, one being written and the .nemo: {size(needed)}"
    if room < needed:
        remedy = "Another run_dir, or a smaller trainer.lrpo.keep_checkpoints (or .checkpoint.keep_best)."
        findings.add("disk", FAIL, text, remedy)
    elif not kept:
        fit = int((room - export) // checkpoint)
        remedy = "Set trainer.lrpo.keep_checkpoints, or make sure that so many suffice."
        findings.add("disk", WARN, f"all checkpoints are kept; {size(room)} free hold {fit} of them", remedy)
    else:
        findings.add("disk", PASS, text)


def check_temporary(
    findings: Findings, model: Path, ranks: int, export: int, directory: Path | None = None, free: int | None = None
) -> None:
    """Room for temporary files on this node.

    model: the base. NeMo 2.2 unpacks a .nemo that is a file once for every one of the `ranks`. export: bytes of the
    .nemo that this node packs at the end, 0 for none.
    """
    place = directory or Path(tempfile.gettempdir())
    room = shutil.disk_usage(place).free if free is None else free
    unpacked = ranks * model.stat().st_size if model.is_file() else 0
    text = f"{size(room)} free in {place}; to unpack the model {size(unpacked)}, to pack it {size(export)}"
    if room >= max(unpacked, export):
        findings.add("temporary files", PASS, text)
    elif unpacked > room:
        remedy = f"Unpack it once, with mkdir DIR and tar -xf {model} -C DIR, and give DIR; or set TMPDIR."
        findings.add("temporary files", FAIL, f"{text}: once for each of {ranks} ranks", remedy)
    else:
        remedy = "Set TMPDIR, or trainer.lrpo.export_nemo=false."
        findings.add("temporary files", FAIL, text, remedy)


def size(count: float) -> str:
    """Bytes for people."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def node_name() -> str:
    """This node as Slurm calls it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
