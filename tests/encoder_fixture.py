"""A random sentence encoder in the sentence-transformers format: real format, built in about a second."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

SENTENCES = (
    "The currency of Japan is the yen.",
    "Die Währung von Japan ist der Yen.",
    "La monnaie du Japon est le yen.",
    "La moneda de Japón es el yen.",
    "日本の通貨は円です。",
    "Валюта Японии — иена.",
    "عملة اليابان هي الين.",
)


def build_tiny_encoder(path: Path, seed: int = 0) -> Path:
    """Write a two-layer BERT with masked mean pooling and a byte-level BPE tokenizer to the directory `path`.

    The same seed gives the same weights; the global random state is left as it was.
    """
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as token_models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[UNK]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    )
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as source:
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(source)
        fast.save_pretrained(source)
        word = models.Transformer(source, max_seq_length=128)
        # Otherwise the temporary directory would be saved with the model.
        word.auto_model.config._name_or_path = ""
        pooling = models.Pooling(word.get_word_embedding_dimension(), pooling_mode="mean")
        SentenceTransformer(modules=[word, pooling], device="cpu").save(str(path), create_model_card=False)
    return Path(path)
