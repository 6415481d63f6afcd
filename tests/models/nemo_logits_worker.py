"""Load .nemo files with NeMo and write their logits and tokenizer: nemo_logits_worker.py IN OUT NEMO [NEMO ...].

IN: .npy of token ids int64 [B, S]. OUT: .npz with `<stem>` float32 [B, S, padded vocabulary] per file, and
`<stem>.json`: padded vocabulary and what the tokenizer makes of a conversation. Each model is saved again, as
`<stem>_again.nemo` in the directory of OUT, and that file is loaded and evaluated too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ON_CPU = {
    "use_cpu_initialization": True,
    "transformer_engine": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}
CHAT = [{"role": "user", "content": "Où est-ce? 東京"}]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from nemo_lrpo.actor.platform import ensure_platform

    ensure_platform()
    import torch
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo
    from omegaconf import OmegaConf

    from nemo_lrpo.actor.tokenizer import ArchiveTokenizer

    class Model(ArchiveTokenizer, MegatronGPTModel):
        pass

    tokens = torch.from_numpy(np.load(sys.argv[1]))
    out = Path(sys.argv[2])
    results = {}

    def load(path: Path) -> Model:
        config = OmegaConf.create(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "devices": 1,
                    "num_nodes": 1,
                    "precision": 32,
                    "logger": False,
                    "enable_checkpointing": False,
                },
                "model": {"precision": 32, **ON_CPU},
            }
        )
        config.model = load_and_override_model_config(str(path), config.model)
        trainer = MegatronTrainerBuilder(config).create_trainer()
        return load_from_nemo(Model, config.model, trainer, strict=True, restore_path=str(path))

    def evaluate(model: Model, name: str) -> None:
        module = model.get_model_module_list()[0].eval()
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        mask = torch.ones(tokens.size(1), tokens.size(1)).triu(1).bool()[None, None]
        with torch.no_grad():
            results[name] = module(tokens, positions, mask).float().numpy()
        tokenizer = model.tokenizer.tokenizer
        facts = {
            "padded": model.padded_vocab_size,
            "chat": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True),
            "additional": tokenizer.additional_special_tokens,
            "type": model.cfg.tokenizer.type,
        }
        (out.parent / f"{name}.json").write_text(json.dumps(facts))

    for path in map(Path, sys.argv[3:]):
        model = load(path)
        evaluate(model, path.stem)
        again = out.parent / f"{path.stem}_again.nemo"
        model.save_to(str(again))
        evaluate(load(again), again.stem)
    np.savez(out, **results)


if __name__ == "__main__":
    main()
