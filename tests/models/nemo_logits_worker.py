"""Load .nemo files with NeMo and write what they compute: nemo_logits_worker.py TOKENS [OUT TP PP NEMO ... --] ...

TOKENS: .npy, ids int64 [B, S]. OUT: a directory that receives `<stem>.npy`, logits float32 [B, S, padded vocabulary],
and `<stem>.json`, facts on tokenizer and vocabulary, for each file. TP, PP: parallel sizes, of one rank each under
torchrun. Each model is saved as OUT/`<stem>_again.nemo` too, which is loaded and evaluated like the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemo_lrpo.actor.platform import ensure_platform, model_overrides

ensure_platform()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel  # noqa: E402
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder  # noqa: E402
from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from nemo_lrpo.actor.tokenizer import ArchiveTokenizer  # noqa: E402

CHAT = [{"role": "user", "content": "Où est-ce? 東京"}]


class Model(ArchiveTokenizer, MegatronGPTModel):
    """NeMo's own model, no actor around it."""


def load(path: Path, tensor: int, pipeline: int) -> Model:
    config = OmegaConf.create(
        {
            "trainer": {
                "accelerator": "cpu",
                "devices": tensor * pipeline,
                "num_nodes": 1,
                "precision": 32,
                "logger": False,
                "enable_checkpointing": False,
            },
            "model": {
                "precision": 32,
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                **model_overrides(),
            },
        }
    )
    config.model = load_and_override_model_config(str(path), config.model)
    trainer = MegatronTrainerBuilder(config).create_trainer()
    return load_from_nemo(Model, config.model, trainer, strict=True, restore_path=str(path))


@torch.no_grad()
def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor | None:
    """float32 [B, S, padded vocabulary] on the last pipeline stage, None before it."""
    module = model.get_model_module_list()[0].eval()
    rows, length = tokens.shape
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(length, rows, model.cfg.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        module.set_input_tensor([hidden])
    output = module(tokens, torch.arange(length).expand_as(tokens), mask)
    if not parallel_state.is_pipeline_last_stage():
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return gather_from_tensor_model_parallel_region(output.float())


def evaluate(model: Model, tokens: torch.Tensor, out: Path) -> None:
    found = logits(model, tokens)
    if found is None or parallel_state.get_tensor_model_parallel_rank():
        return
    np.save(out.with_suffix(".npy"), found.numpy())
    tokenizer = model.tokenizer.tokenizer
    facts = {
        "padded": model.padded_vocab_size,
        "chat": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True),
        "additional": tokenizer.additional_special_tokens,
        "eos": model.tokenizer.eos_id,
    }
    out.with_suffix(".json").write_text(json.dumps(facts))


def run(tokens: torch.Tensor, out: Path, tensor: int, pipeline: int, paths: list[Path]) -> None:
    parallel_state.destroy_model_parallel()
    for path in paths:
        model = load(path, tensor, pipeline)
        evaluate(model, tokens, out / path.stem)
        copy = out / f"{path.stem}_again.nemo"
        model.save_to(str(copy))
        evaluate(load(copy, tensor, pipeline), tokens, out / copy.stem)


def main() -> None:
    tokens = torch.from_numpy(np.load(sys.argv[1]))
    arguments = sys.argv[2:]
    while arguments:
        end = arguments.index("--")
        (out, tensor, pipeline, *paths), arguments = arguments[:end], arguments[end + 1 :]
        run(tokens, Path(out), int(tensor), int(pipeline), [Path(path) for path in paths])


if __name__ == "__main__":
    main()
