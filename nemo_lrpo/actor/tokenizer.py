"""The tokenizer that travels inside a .nemo."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from nemo_aligner.utils.utils import load_checkpoint_model_config
from omegaconf import open_dict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_lrpo.config.checks import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class ArchiveTokenizer:
    """Mix into a NeMo model class, before it, so that it opens a Hugging Face tokenizer from its own archive.

    NeMo 2.2 takes `tokenizer.type` for a name or a directory outside the archive. Here an unset type means: the
    directory of `tokenizer.model`, an archive entry as tools/hf_to_nemo.py writes it. NeMo carries that entry and
    `tokenizer.merge_file` (tokenizer_config.json) along when the model is saved again.
    """

    def _build_tokenizer(self) -> None:
        section = self._cfg.tokenizer
        bundled = section.library == "huggingface" and not section.get("type") and section.get("model")
        if not bundled:
            super()._build_tokenizer()
            return
        entry = section.model
        path = self.register_artifact("tokenizer.model", entry)
        with open_dict(section):
            # NeMo registers it once more; given the path instead of the entry, it would take it for a file outside.
            section.model = entry
            section.type = str(Path(path).parent)
            try:
                super()._build_tokenizer()
            finally:
                # The unpacked directory is gone after loading; a saved copy must not refer to it.
                section.type = None


def open_tokenizer(nemo: str | Path) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer of a .nemo file or extracted directory, without loading the model.

    Raises ConfigError for a .nemo with another kind of tokenizer (SentencePiece, tiktoken).
    """
    path = Path(nemo)
    section = load_checkpoint_model_config(str(path)).tokenizer
    if section.get("library") != "huggingface":
        raise ConfigError(
            f"{path}: its tokenizer library is {section.get('library')!r}; accepted: 'huggingface'. Convert the model "
            "from its Hugging Face directory with tools/hf_to_nemo.py."
        )
    if section.get("type"):
        return AutoTokenizer.from_pretrained(section.type, local_files_only=True)
    if path.is_dir():
        return AutoTokenizer.from_pretrained(_tokenizer_directory(path), local_files_only=True)
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if Path(member.name).name.endswith(_TOKENIZER_FILES)]
        archive.extractall(unpacked, members=members, filter="data")
        return AutoTokenizer.from_pretrained(_tokenizer_directory(Path(unpacked)), local_files_only=True)


def _tokenizer_directory(directory: Path) -> str:
    found = sorted(directory.rglob("*tokenizer.json"))
    if not found:
        raise ConfigError(f"{directory}: no tokenizer.json inside; convert the model with tools/hf_to_nemo.py.")
    return str(found[0].parent)
