"""The demo's tokenizer: byte-level BPE over the world's text, with the language tags as single tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemo_lrpo.data.languages import language_tag

PAD, BOS, EOS, USER, ASSISTANT, SYSTEM = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '</s>\n' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# A word with the space before it, a digit, a run of other signs, or white space. Scripts that are written without
# spaces would otherwise be one word a sentence, and whole sentences one token.
_WORDS = r" ?[\p{L}\p{M}]{1,12}| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"


def train_tokenizer(
    texts: Iterable[str], languages: Sequence[str], vocabulary: int = 4096, show_progress: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` ids learnt from `texts`, which any text survives unchanged (bytes at the bottom).

    Special tokens come first: padding, begin, end, three roles, one tag per language. Equal texts in equal order give
    an equal tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    roles_and_tags = [USER, ASSISTANT, SYSTEM, *map(language_tag, languages)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, *roles_and_tags],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=roles_and_tags,
        chat_template=CHAT_TEMPLATE,
        # Otherwise decoding takes the space before a full stop away, and text no longer survives.
        clean_up_tokenization_spaces=False,
    )
