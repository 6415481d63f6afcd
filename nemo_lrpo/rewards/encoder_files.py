"""What a model's directory may make the encoder run: nothing of its own.

sentence-transformers imports the classes that modules.json names, also from Python files that lie in the directory,
whatever trust_remote_code says, and calls the activation function that a Dense layer's config.json names.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_lrpo.config.checks import ConfigError

_MODULES = tuple(
    f"sentence_transformers.models.{name}"
    for name in ("Transformer", "Pooling", "Normalize", "Dense", "Dropout", "LayerNorm")
)
_ACTIVATIONS = "torch.nn.modules."


def refuse_code(key: str, path: Path) -> None:
    """Raise ConfigError, which names the file, if loading the sentence-transformers model at `path` would run code that
    is not sentence-transformers' or torch's own."""
    index = path / "modules.json"
    if not index.is_file():
        return
    for module in _read(index, key):
        kind = module.get("type") if isinstance(module, dict) else None
        if kind not in _MODULES:
            raise ConfigError(
                f"{key}: {index} asks for the module {kind!r}; accepted: {', '.join(_MODULES)}. A model's own code is "
                "never run."
            )
        settings = path / str(module.get("path", "")) / "config.json"
        if not kind.endswith(".Dense") or not settings.is_file():
            continue
        read = _read(settings, key)
        activation = read.get("activation_function", _ACTIVATIONS) if isinstance(read, dict) else None
        if not isinstance(activation, str) or not activation.startswith(_ACTIVATIONS):
            raise ConfigError(f"{key}: {settings} asks for {activation!r}; accepted: classes of {_ACTIVATIONS}*.")


def _read(file: Path, key: str) -> list | dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {file} is no JSON: {error}.") from error
    return found if isinstance(found, (list, dict)) else []
