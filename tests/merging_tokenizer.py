"""A tokenizer for which a mark and the line's end after it are one token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer(texts: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """Splits words as Qwen and Llama 3 do: punctuation and the line's end after it are one. `texts`: to learn from."""
    words = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}+|\s+|\p{N}+"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    bpe.train_from_iterator([text for text in texts for _ in range(9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=template)
