"""Modules that NeMo-Aligner imports at load time and that are not installed: importing works, using them does not."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any, NoReturn

from nemo_lrpo.cpu.replacement import is_installed

_BERT = "nemo.collections.nlp.models.language_modeling.megatron.bert.bert_spec"
_NO_TENSORRT = "TensorRT-LLM is not installed; generate with Megatron instead (rollout.backend=megatron)"
_NO_TE = "Transformer Engine is not installed; BERT models need it"

STUBBED: dict[str, tuple[str, str]] = {
    "tensorrt_llm": ("tensorrt_llm", _NO_TENSORRT),
    "nemo.export.tensorrt_llm": ("tensorrt_llm", _NO_TENSORRT),
    "nemo.export.trt_llm.tensorrt_llm_run": ("tensorrt_llm", _NO_TENSORRT),
    "nemo.export.trt_llm.nemo_ckpt_loader.nemo_file": ("tensorrt_llm", _NO_TENSORRT),
    _BERT: ("transformer_engine", _NO_TE),
}
"""Module -> (package without which it cannot be imported, what to say when it is used)."""


class Absent:
    """A name of an absent module. It can be imported, passed on and checked against; calling it raises."""

    def __init__(self, name: str, message: str) -> None:
        self._name = name
        self._message = message

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}", self._message)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"{self._message} ({self._name} was called).")

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<absent {self._name}>"


class StubModule(ModuleType):
    """A module all of whose names are Absent."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, f"{message}.")
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        self._message = message

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}", self._message)


def install() -> tuple[str, ...]:
    """Put a stub in sys.modules for each module of STUBBED whose package is absent; returns their names."""
    absent = [module for module, (package, _) in STUBBED.items() if not is_installed(package)]
    for module in absent:
        sys.modules[module] = StubModule(module, STUBBED[module][1])
    return tuple(absent)
