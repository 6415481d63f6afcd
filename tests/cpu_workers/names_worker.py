"""Installs the stand-in in a fresh process and prints, as JSON, which names differ from before and how they behave."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import threading
from typing import Any

import torch


def snapshot(owners: list[Any]) -> dict[str, dict[str, Any]]:
    """Owner's dotted name -> each of its names and the very object behind it."""
    return {dotted(owner): {name: inspect.getattr_static(owner, name) for name in dir(owner)} for owner in owners}


def dotted(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    # torch.nn.Module lives in torch.nn.modules.module; the table calls it by its public name.
    return {"torch.nn.modules.module.Module": "torch.nn.Module"}.get(
        f"{owner.__module__}.{owner.__qualname__}", f"{owner.__module__}.{owner.__qualname__}"
    )


def differing(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    missing = object()
    return {
        f"{owner}.{name}"
        for owner, names in after.items()
        for name, now in names.items()
        if before[owner].get(name, missing) is not now
    }


def main() -> None:
    from nemo_lrpo import cpu
    from nemo_lrpo.cpu import replacement, stubs

    only_missing = sys.argv[1:] == ["--missing"]
    torch_owners = [torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed]
    known_to_torch = snapshot(torch_owners)
    modules_before = set(sys.modules)
    changed: set[str] = set()
    new_names: set[str] = set()
    apply = replacement.apply

    def watched(table: tuple[replacement.Replacement, ...]) -> None:
        owners = list({id(o): o for o in (replacement.resolve(entry.target)[0] for entry in table)}.values())
        before = snapshot(owners)
        apply(table)
        found = differing(before, snapshot(owners))
        changed.update(found)
        new_names.update(name for name in found if name.rpartition(".")[2] not in before[name.rpartition(".")[0]])

    replacement.apply = watched
    install = cpu.install_missing if only_missing else cpu.install
    install()
    replacement.apply = apply

    now = snapshot(torch_owners)
    kept = {owner: {name: now[owner][name] for name in names} for owner, names in known_to_torch.items()}
    seen: dict[str, Any] = {
        "changed": sorted(changed),
        "new_names": sorted(new_names),
        "torch_changed": sorted(differing(known_to_torch, kept)),
        "table": [entry.target for entry in cpu.replaced()] if not only_missing else [],
        "stubs": sorted(
            name
            for name, module in sys.modules.items()
            if isinstance(module, stubs.StubModule) and name == module.__name__
        ),
        "cuda_room_loaded": "nemo_lrpo.cpu.cuda" in set(sys.modules) - modules_before,
    }

    install()
    seen["changed_by_second_call"] = sorted(differing(now, snapshot(torch_owners)))
    if not only_missing:
        seen["behaviour"] = behaviour()
        seen["stub_errors"] = stub_errors()
    print("RESULT " + json.dumps(seen))


def behaviour() -> dict[str, bool]:
    tensor = torch.ones(3)
    checks = {
        "factories make CPU tensors": all(
            made.device.type == "cpu"
            for made in (
                torch.tensor([1.0], device="cuda"),
                torch.zeros(2, device=torch.device("cuda", 0)),
                torch.empty_like(tensor, device="cuda:1"),
                torch.arange(3, device=torch.cuda.current_device()),
                tensor.new_zeros(2, device="cuda"),
                torch.cuda.LongTensor([1, 2]),
            )
        ),
        "moves keep the tensor": tensor.cuda() is tensor
        and tensor.to("cuda:0") is tensor
        and tensor.to(device="cuda", dtype=torch.float32) is tensor
        and tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor,
        "dtype still changes": tensor.to("cuda", torch.float64).dtype == torch.float64,
        "type names": tensor.type() == "torch.cuda.FloatTensor"
        and tensor.type("torch.cuda.LongTensor").dtype == torch.int64
        and tensor.type(torch.float64).dtype == torch.float64,
        "isinstance": isinstance(tensor, torch.cuda.FloatTensor) and not isinstance(tensor, torch.cuda.LongTensor),
        "no GPU is claimed": not torch.cuda.is_available() and torch.cuda.device_count() == 0,
        "modules stay": torch.nn.Linear(2, 2).cuda().to("cuda").weight.device.type == "cpu",
    }

    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    checks["random state is restored"] = torch.equal(first, torch.rand(4))

    from megatron.core.tensor_parallel import random as megatron_random

    tracker = megatron_random.CudaRNGStatesTracker()
    tracker.add("test", 7)
    outside = torch.get_rng_state()
    with tracker.fork("test"):
        inside = torch.rand(4)
    checks["Megatron's tracker forks the generator"] = torch.equal(outside, torch.get_rng_state()) and torch.equal(
        inside, torch.rand(4, generator=torch.Generator().manual_seed(7))
    )

    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    with torch.cuda.stream(stream):
        torch.cuda.current_stream().wait_stream(stream)
    checks["streams"] = stream.query()

    in_thread: list[str] = []
    thread = threading.Thread(target=lambda: in_thread.append(torch.ones(1, device="cuda").device.type))
    thread.start()
    thread.join()
    checks["all threads"] = in_thread == ["cpu"]

    checks["TorchScript"] = torch.equal(torch.jit.script(scripted)(tensor), tensor)
    checks["torch.compile leaves functions alone"] = torch.compile(scripted) is scripted
    return checks


def scripted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros_like(x)


def stub_errors() -> dict[str, str]:
    """What happens to somebody who uses what is not installed."""
    aligner = importlib.import_module("nemo_aligner.utils.trt_llm")
    specs = importlib.import_module("nemo.collections.nlp.models.language_modeling.megatron_gpt_model")
    overrides = importlib.import_module("nemo.collections.nlp.parts.nlp_overrides")
    utils = importlib.import_module("nemo.collections.nlp.modules.common.megatron.utils")
    attempts = {
        "tensorrt_llm": lambda: aligner.tensorrt_llm.runtime.SamplingConfig(end_id=0),
        "exporter": lambda: aligner.TensorRTLLM("engine"),
        "te layers": lambda: specs.get_specs("megatron_falcon_gpt"),
        "apex adam": lambda: overrides.MegatronDistributedFusedAdam([]),
        "apex norm": lambda: utils.FusedLayerNorm(8),
    }
    errors = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            errors[name] = ""
    return errors


if __name__ == "__main__":
    main()
