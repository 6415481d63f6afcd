"""Convert a Hugging Face directory (Llama 2 and 3, Qwen 2 and 2.5, Gemma 2) to a `.nemo` for Megatron GPT models.

    python tools/hf_to_nemo.py --hf DIR --out MODEL.nemo [--precision 32|bf16]

The weights are written straight into Megatron-Core's distributed checkpoint, tensor by tensor, without building the
model: no GPU, Megatron, Apex or Transformer Engine is needed, and host memory holds a few copies of the largest tensor
(the embedding), whatever the model's size. The result loads at any tensor and pipeline parallel size and with either
layer spec (shards carry Transformer Engine's names, which Megatron's local spec maps its own onto). What depends on the
machine (layer spec, fusions, precision of training, parallel sizes) is left to the trainer.

Inside the archive:

    model_config.yaml       NeMo's model section; its `huggingface` part keeps config.json and generation_config.json
    model_weights/          the distributed checkpoint
    tokenizer.json          the tokenizer; with its neighbour, all that transformers.AutoTokenizer needs
    tokenizer_config.json   special tokens and chat template

With a name that does not end in .nemo the same files are left as a directory, which the trainer reads too: for large
models that saves packing here and unpacking on every node.

NeMo 2.2 has no archive entry for a Hugging Face tokenizer: `tokenizer.type` is a name or a directory outside. The two
files therefore travel under keys that NeMo does carry along when a model is saved again (`tokenizer.model`,
`tokenizer.merge_file`), and `nemo_lrpo.actor.tokenizer.ArchiveTokenizer` opens the directory that they lie in. With
NeMo's own classes, unpack the archive and set `tokenizer.type` to that directory.

Gemma 2: NeMo's layers look back over the window in every second layer from the second on, Gemma's from the first on.
Up to `sliding_window` tokens (4,096) the two are the same; keep sequences below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.conversion import mapping  # noqa: E402
from tools.conversion.archive import check_target, new_archive  # noqa: E402
from tools.conversion.configs import nemo_config, read_huggingface, vocabulary_padding  # noqa: E402
from tools.conversion.errors import ConversionError  # noqa: E402
from tools.conversion.huggingface import HfWeights  # noqa: E402
from tools.conversion.shards import DIRECTORY, write_shards  # noqa: E402
from tools.conversion.tokenizers import load_tokenizer, write_tokenizer  # noqa: E402

__all__ = ["ConversionError", "convert", "vocabulary_padding"]

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}


def convert(hf_dir: str | Path, out: str | Path, precision: str = "32") -> Path:
    """Write `out` (.nemo, or a directory) from the Hugging Face directory `hf_dir`; returns its path.

    precision: "32" or "bf16", the type of the stored weights. The output appears complete or not at all. Raises
    ConversionError for another architecture, an unsupported option of it, or missing or inconsistent files.
    """
    source, target = Path(hf_dir), Path(out)
    if precision not in PRECISIONS:
        raise ConversionError(f"precision={precision!r} is not known; accepted: {', '.join(PRECISIONS)}.")
    check_target(target)
    hf, shape = read_huggingface(source)
    weights = HfWeights(source)
    tokenizer = load_tokenizer(source)
    divisor, padded = vocabulary_padding(len(tokenizer), shape.vocabulary)
    config = nemo_config(hf, shape, divisor, tokenizer, precision, _generation(source))
    plan = list(mapping.entries(shape, padded))
    for entry in plan:
        for name, part in zip(entry.names, entry.parts):
            weights.check(name, part)

    with new_archive(target) as content, tqdm(total=len(plan), desc="converting", unit="tensor") as progress:

        def read(entry: mapping.Entry) -> torch.Tensor:
            progress.update()
            return entry.join([weights.read(name) for name in entry.names])

        write_tokenizer(tokenizer, content)
        OmegaConf.save(OmegaConf.create(config), content / "model_config.yaml")
        states = mapping.extra_states(shape)
        write_shards(plan, read, states, shape.layers, PRECISIONS[precision], content / DIRECTORY)
    return target


def _generation(source: Path) -> dict[str, object] | None:
    path = source / "generation_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(arguments: list[str] | None = None) -> None:
    """Command line; `--help` describes it."""
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face directory (Llama 2 and 3, Qwen 2 and 2.5, Gemma 2) to a .nemo for NeMo's "
        "Megatron GPT models. Memory: a few copies of the largest tensor. Disk: the model, twice while it is packed."
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="directory with config, safetensors and tokenizer")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="the .nemo to write; a name without .nemo becomes a directory"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="type of the stored weights (default 32)")
    options = parser.parse_args(arguments)
    try:
        path = convert(options.hf, options.out, options.precision)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    print(f"wrote {path} ({sum(file.stat().st_size for file in files) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
