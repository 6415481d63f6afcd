"""CUDA's names on a machine without a GPU: the device is the CPU, streams have nothing to wait for.

NeMo, NeMo-Aligner and Megatron-Core write `device="cuda"`, `.cuda()` and `torch.cuda.*` out literally. The functions
that take a device are replaced one by one: a TorchFunctionMode would cover them all in one place, but it costs
microseconds on *every* torch call and, being local to a thread, misses all threads but the first. These functions are
only a handful, and a test holds the list against what the three libraries call.

Two things differ from a GPU and cannot be bridged here. `.cuda()` returns the tensor itself, never a copy. The CPU has
one random generator, so torch's "CUDA" generator is its default one: whatever draws from it on one rank of a
tensor-parallel group and not on the others makes those ranks sample different tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nemo_lrpo.cpu.replacement import Replacement, value

CPU = torch.device("cpu")

FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
NOISE = (
    r"When using async grad allreduce it is recommended to set the environment variable "
    r"CUDA_DEVICE_MAX_CONNECTIONS to 1 for maximum speedup",
)
TENSOR_TYPES = ("Bool", "Byte", "Char", "Double", "Float", "Half", "BFloat16", "Int", "Long", "Short")


def is_cuda(device: object) -> bool:
    """Whether `device` ("cuda", "cuda:0", torch.device("cuda", 0)) means a GPU."""
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class Stream:
    """A CUDA stream where all work is done when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> object:
        return event

    def query(self) -> bool:
        return True


# Each replacement is a function of its own: torch.compile keeps rules by function and refuses one under two names.


def _no_operation(original: Any) -> Callable[..., None]:
    """A device operation that has no effect on the CPU."""

    def nothing(*args: object, **kwargs: object) -> None:
        pass

    return nothing


def _no_move(original: Any) -> Callable[..., Any]:
    """A move to the device where the object already is."""

    def itself(self: Any, *args: object, **kwargs: object) -> Any:
        return self

    return itself


def _make_stream(original: Any) -> Callable[..., Stream]:
    stream = Stream()

    def the_stream(device: object = None) -> Stream:
        return stream

    return the_stream


def _current_device() -> torch.device:
    return CPU


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _make_get_rng_state(original: Any) -> Callable[..., torch.Tensor]:
    def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    return get_rng_state


def _make_set_rng_state(original: Any) -> Callable[..., None]:
    def set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(new_state)

    return set_rng_state


def _device_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A factory function whose `device=` may be a GPU."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return factory


def _scriptable(name: str) -> Callable[[Any], Any]:
    """As `_device_on_cpu`, known to TorchScript as the operator that it wraps."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        factory = _device_on_cpu(original)
        torch.jit._builtins._register_builtin(factory, f"aten::{name}")
        return factory

    return make


def _make_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _make_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is None:
            # Megatron's optimizers tell parameters apart by "torch.cuda.FloatTensor" and the like.
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, non_blocking, **kwargs)

    return type


def _make_set_random_seed(original: Callable[[int], None]) -> Callable[[int], None]:
    from megatron.core import parallel_state, tensor_parallel

    @functools.wraps(original)
    def set_random_seed(seed_: int) -> None:
        original(seed_)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * stage)

    return set_random_seed


TORCH_REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement("torch.cuda.current_device", "the device of a rank is the CPU", value(_current_device)),
    Replacement("torch.cuda.set_device", "there is one device", _no_operation),
    Replacement("torch.cuda.synchronize", "CPU operations are done when they return", _no_operation),
    Replacement("torch.cuda.Stream", "NeMo and Megatron create streams", value(Stream)),
    Replacement("torch.cuda.current_stream", "Megatron waits for the current stream", _make_stream),
    Replacement("torch.cuda.default_stream", "Megatron waits for the default stream", _make_stream),
    Replacement("torch.cuda.manual_seed", "the CPU has one generator", value(_manual_seed)),
    Replacement("torch.cuda.get_rng_state", "the CPU has one generator", _make_get_rng_state),
    Replacement("torch.cuda.set_rng_state", "the CPU has one generator", _make_set_rng_state),
    Replacement("torch.Tensor.cuda", "tensors stay where they are", _no_move),
    Replacement("torch.Tensor.to", "literal 'cuda' devices", _make_to),
    Replacement("torch.Tensor.type", "Megatron asks for the names of CUDA's tensor types", _make_type),
    Replacement("torch.nn.Module.cuda", "modules stay where they are", _no_move),
    *(Replacement(f"torch.{name}", "literal 'cuda' devices", _scriptable(name)) for name in FACTORIES),
    *(Replacement(f"torch.Tensor.{name}", "literal 'cuda' devices", _device_on_cpu) for name in TENSOR_FACTORIES),
    *(
        Replacement(
            f"torch.cuda.{name}Tensor",
            "constructors and isinstance checks of CUDA's tensor types",
            value(getattr(torch, f"{name}Tensor")),
        )
        for name in TENSOR_TYPES
    ),
)
"""Names of torch itself. They must be in place before NeMo and Megatron-Core are imported, which keep copies."""

STACK_REPLACEMENTS: tuple[Replacement, ...] = (
    Replacement(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state", "the CPU has one generator", _make_get_rng_state
    ),
    Replacement(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "torch.cuda queues it until CUDA starts, which it never does",
        _make_set_rng_state,
    ),
    Replacement(
        "nemo.collections.nlp.modules.common.megatron.megatron_init._set_random_seed",
        "seeds Megatron's tracker of random states only where it counts a GPU",
        _make_set_random_seed,
    ),
    Replacement("nemo.core.classes.modelPT.ModelPT.cuda", "models stay where they are", _no_move),
)
"""Names of NeMo and Megatron-Core that hold CUDA by other means than torch's functions."""
