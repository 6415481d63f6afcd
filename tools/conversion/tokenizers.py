"""The tokenizer with its chat template, out of a Hugging Face directory into a .nemo and back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.conversion.archive import NemoArchive
from tools.conversion.errors import ConversionError

FILES = {"model": "tokenizer.json", "merge_file": "tokenizer_config.json"}
"""Key of NeMo's `tokenizer` section -> the file that travels under it."""


def load_tokenizer(source: Path) -> Any:
    """The fast tokenizer of a directory. Raises ConversionError where there is none, or it has no end token."""
    from transformers import AutoTokenizer

    try:
        # A local path, and no code that the directory may bring.
        tokenizer = AutoTokenizer.from_pretrained(str(source.resolve()), use_fast=True, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{source}: no usable tokenizer ({first}); tokenizer.json is needed.") from error
    if not tokenizer.is_fast:
        raise ConversionError(f"{source}: the tokenizer has no tokenizer.json; save it with a fast tokenizer class.")
    if tokenizer.eos_token is None:
        raise ConversionError(f"{source / 'tokenizer_config.json'}: eos_token is not set; generation needs one.")
    return tokenizer


def write_tokenizer(tokenizer: Any, content: Path) -> None:
    """Write the two files of FILES into `content`."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        saved = json.loads((Path(scratch) / "tokenizer_config.json").read_text(encoding="utf-8"))
        # Later transformers write the template beside it; two files are all that travels.
        saved.setdefault("chat_template", tokenizer.chat_template)
        text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
        (content / "tokenizer_config.json").write_text(text, encoding="utf-8")
        shutil.copyfile(Path(scratch) / "tokenizer.json", content / "tokenizer.json")


def load_from_archive(archive: NemoArchive, section: Mapping[str, Any]) -> Any:
    """The tokenizer inside a .nemo, by its `tokenizer` section. Raises ConversionError for another kind."""
    with tempfile.TemporaryDirectory() as scratch:
        for key, name in FILES.items():
            entry = str(section.get(key) or "")
            stored = entry.removeprefix("nemo:")
            if not entry.startswith("nemo:") or not stored.endswith(name):
                raise ConversionError(
                    f"{archive.path}: it brings no {name} (tokenizer.{key}={section.get(key)!r}); give the directory "
                    "of its Hugging Face tokenizer with --tokenizer."
                )
            with archive.open(stored) as file:
                (Path(scratch) / name).write_bytes(file.read())
        return load_tokenizer(Path(scratch))
