"""One name of another library and what stands in its place, so that every replacement is a line in a table."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"
"""Megatron-Core's module of Transformer Engine's layers; it takes its presence for Transformer Engine's."""


@dataclass(frozen=True)
class Replacement:
    """`target` ("torch.Tensor.cuda") becomes `make(original)`; `original` is None where there is no such name yet.

    `supplied_by` names packages that bring the real thing: where one of them is installed, nothing is replaced.
    """

    target: str
    reason: str
    make: Callable[[Any], Any]
    supplied_by: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        return not any(is_installed(package) for package in self.supplied_by)


def value(new: Any) -> Callable[[Any], Any]:
    """`make` of a replacement that does not depend on the original."""
    return lambda original: new


def is_installed(package: str) -> bool:
    """Whether `package` can be found, without importing it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def resolve(target: str) -> tuple[Any, str]:
    """Module or class that owns the last part of `target`, and that part. Imports the module.

    Raises ModuleNotFoundError where there is no such module, AttributeError where it has no such class.
    """
    *path, name = target.split(".")
    for split in range(len(path), 0, -1):
        module_name = ".".join(path[:split])
        try:
            owner = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A parent that is a class looks like a missing module; a module whose own import fails does not.
            if error.name != module_name:
                raise
            continue
        for attribute in path[split:]:
            owner = getattr(owner, attribute)
        return owner, name
    raise ModuleNotFoundError(f"No module owns {target!r}.", name=path[0] if path else target)


def import_over(module: str, absent: str, **names: Any) -> ModuleType:
    """`module`, imported while a module `absent` with `names` stands in for the one that it needs.

    The stand-in is taken away again: its presence would tell others that the real one is installed.
    """
    if module in sys.modules:
        return sys.modules[module]
    stand_in = ModuleType(absent)
    vars(stand_in).update(names)
    sys.modules[absent] = stand_in
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[absent]


def apply(replacements: Iterable[Replacement]) -> None:
    """Carry out the replacements that are needed here.

    All owners are imported before the first name is replaced, so that no import sees half of a table.
    """
    needed = [replacement for replacement in replacements if replacement.needed]
    owners = [resolve(replacement.target) for replacement in needed]
    for replacement, (owner, name) in zip(needed, owners, strict=True):
        setattr(owner, name, replacement.make(getattr(owner, name, None)))
