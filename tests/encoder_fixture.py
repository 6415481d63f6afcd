"""Random sentence encoders in the sentence-transformers format: real formats, each built in about a second."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SENTENCES = (
    "The currency of Japan is the yen.",
    "Die Währung von Japan ist der Yen.",
    "La monnaie du Japon est le yen.",
    "La moneda de Japón es el yen.",
    "日本の通貨は円です。",
    "Валюта Японии — иена.",
    "عملة اليابان هي الين.",
)
SHAPES = ("plain", "mmbert", "e5", "labse", "instructor", "last")
"""plain: BERT, mean pooling, no special tokens. mmbert: ModernBERT with local and global layers, mean pooling. e5:
XLM-R with prompts, mean pooling, normalised. labse: BERT, pooling by the first token, Dense, normalised. instructor:
BERT that lower-cases, mean pooling with its default prompt left out. last: ModernBERT padded on the left, pooling by
the last token."""


def build_tiny_encoder(path: Path, seed: int = 0, shape: str = "plain") -> Path:
    """Write a small encoder of one of SHAPES with a byte-level BPE tokenizer to the directory `path`.

    The same seed gives the same weights; the global random state is left as it was.
    """
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoModel

    special = {"plain": (), "e5": ("<s>", "</s>")}.get(shape, ("[CLS]", "[SEP]"))
    fast = _tokenizer(special, "left" if shape == "last" else "right", {"e5": 64, "labse": 125}.get(shape, 128))
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as source:
        torch.manual_seed(seed)
        AutoModel.from_config(_config(shape, fast)).save_pretrained(source)
        fast.save_pretrained(source)
        lower_case = shape == "instructor"
        word = models.Transformer(source, max_seq_length=fast.model_max_length, do_lower_case=lower_case)
        # Otherwise the temporary directory would be saved with the model.
        word.auto_model.config._name_or_path = ""
        mode = {"labse": "cls", "last": "lasttoken"}.get(shape, "mean")
        modules: list[torch.nn.Module] = [
            word,
            models.Pooling(32, pooling_mode=mode, include_prompt=shape != "instructor"),
        ]
        if shape == "labse":
            modules.append(models.Dense(32, 24))
        if shape in ("labse", "e5"):
            modules.append(models.Normalize())
        model = SentenceTransformer(modules=modules, device="cpu")
        if shape == "e5":
            model.prompts = {"query": "query: ", "passage": "passage: "}
        if shape == "instructor":
            model.prompts, model.default_prompt_name = {"task": "Which answer is the same? "}, "task"
        model.save(str(path), create_model_card=False)
    return Path(path)


def _tokenizer(special: tuple[str, ...], padding_side: str, window: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[UNK]", *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A {special[1]}", special_tokens=[(special[0], 2), (special[1], 3)]
        )
    # As many published tokenizers come; who calls them says otherwise.
    tokenizer.enable_truncation(48)
    tokenizer.enable_padding(length=20)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=window,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(shape: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    from transformers import BertConfig, ModernBertConfig, XLMRobertaConfig

    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if shape in ("mmbert", "last"):
        # The first layer of three reads everything, the others 8 tokens to either side.
        special = {f"{name}_token_id": number for name, number in (("bos", 2), ("cls", 2), ("eos", 3), ("sep", 3))}
        return ModernBertConfig(**{**sizes, "num_hidden_layers": 4}, local_attention=16, **special)
    if shape == "labse":
        return BertConfig(**{**sizes, "max_position_embeddings": 125})
    if shape == "e5":
        # XLM-R's positions begin after the padding token's id.
        return XLMRobertaConfig(**{**sizes, "max_position_embeddings": 65})
    return BertConfig(**sizes)
