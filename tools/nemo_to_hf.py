"""Convert a `.nemo` of a Llama, Qwen 2 or Gemma 2 model to a Hugging Face directory: the way back of hf_to_nemo.py.

    python tools/nemo_to_hf.py --nemo MODEL.nemo --out DIR [--precision keep|32|bf16] [--tokenizer DIR]

Reads what training exports (`<run_dir>/model.nemo`), at whatever parallel sizes it was saved, packed or as a directory;
a packed one is not unpacked. One tensor is in memory at a time. Rows that pad the vocabulary are left out. The
directory holds config.json, safetensors files with their index, generation_config.json where the model brought one, and
the tokenizer with its chat template; transformers, vLLM and TensorRT-LLM read it as they read any other.

A `.nemo` that NeMo's own scripts made has its tokenizer elsewhere: name a Hugging Face directory with --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.conversion import mapping  # noqa: E402
from tools.conversion.archive import NemoArchive, check_target, new_directory  # noqa: E402
from tools.conversion.configs import EXTRAS, huggingface_config  # noqa: E402
from tools.conversion.errors import ConversionError  # noqa: E402
from tools.conversion.huggingface import TensorPlan, write_weights  # noqa: E402
from tools.conversion.shards import ShardReader  # noqa: E402
from tools.conversion.tokenizers import load_from_archive, load_tokenizer  # noqa: E402

PRECISIONS = {"keep": None, "32": torch.float32, "bf16": torch.bfloat16}
_TABLE = "embedding.word_embeddings.weight"


def convert(
    nemo: str | Path,
    out: str | Path,
    precision: str = "keep",
    tokenizer_dir: str | Path | None = None,
    max_shard: int = 5 * 10**9,
) -> Path:
    """Write the Hugging Face directory `out` from the .nemo `nemo`; returns its path.

    precision: type of the written weights, "keep" is that of the stored ones. tokenizer_dir: a directory with the
    tokenizer, in place of the one inside. max_shard: bytes of one file of weights. The directory appears complete or
    not at all. Raises ConversionError for another kind of model, weights in another format or missing files.
    """
    if precision not in PRECISIONS:
        raise ConversionError(f"precision={precision!r} is not known; accepted: {', '.join(PRECISIONS)}.")
    source, target = Path(nemo), Path(out)
    check_target(target)
    with NemoArchive(source) as archive:
        config = _model_config(archive)
        tokenizer = (
            load_from_archive(archive, config["tokenizer"])
            if tokenizer_dir is None
            else load_tokenizer(Path(tokenizer_dir))
        )
        reader = ShardReader(archive)
        dtype = PRECISIONS[precision] or reader.dtype(_TABLE)
        hf, shape = huggingface_config(config, len(tokenizer), str(dtype).removeprefix("torch."))
        entries = list(mapping.entries(shape, reader.shape(_TABLE)[0]))
        for entry in entries:
            reader.check(entry)
        plans = [TensorPlan(name, part, dtype) for entry in entries for name, part in zip(entry.names, entry.parts)]

        def tensors() -> Iterator[torch.Tensor]:
            for entry in tqdm(entries, desc="converting", unit="tensor"):
                for tensor in entry.split(reader.read(entry)):
                    yield tensor.to(dtype)

        with new_directory(target) as content:
            tokenizer.save_pretrained(content)
            extras = config.get(EXTRAS) or {}
            _write_json(content / "config.json", hf if extras else {**hf, **_special_ids(tokenizer)})
            generation = extras.get("generation")
            if generation:
                _write_json(content / "generation_config.json", generation)
            write_weights(plans, tensors(), content, max_shard)
    return target


def _model_config(archive: NemoArchive) -> dict[str, Any]:
    with archive.open("model_config.yaml") as file:
        config = OmegaConf.to_container(OmegaConf.create(file.read().decode()), resolve=True)
    if not isinstance(config, dict) or "num_layers" not in config:
        raise ConversionError(f"{archive.path}: model_config.yaml is not that of a Megatron GPT model.")
    return {str(key): value for key, value in config.items()}


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Ids that config.json names, for a model that did not bring them."""
    return {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--help` describes it."""
    parser = argparse.ArgumentParser(
        description="Convert a .nemo of a Llama, Qwen 2 or Gemma 2 model to a Hugging Face directory."
    )
    parser.add_argument("--nemo", required=True, metavar="PATH", help="the .nemo, packed or as a directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write; must not exist")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="keep", help="type of the weights (default: as they are stored)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="take the tokenizer from there instead of from the .nemo")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of one file of weights (default 5)"
    )
    options = parser.parse_args(arguments)
    try:
        path = convert(
            options.nemo, options.out, options.precision, options.tokenizer, int(options.max_shard_gb * 10**9)
        )
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {path} ({sum(file.stat().st_size for file in path.iterdir()) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
