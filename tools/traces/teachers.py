"""Who writes the traces: a model behind an endpoint, a local .nemo, or a file of replies that are there already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.data.errors import DataError
from nemo_lrpo.data.languages import LANGUAGES
from nemo_lrpo.data.rows import Row, json_lines
from nemo_lrpo.explang.format import prefill, tag
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import ORIGIN_FIXED, Prompt, RoutedPrompt, TaggedPrompt
from tools.preparation.endpoint import ChatEndpoint, NoReply, Reply, as_answered

if TYPE_CHECKING:
    from nemo_lrpo.actor.actor import MegatronActor

INSTRUCTION = """\
First think about the question in {language} and in no other language, step by step; then give a short answer in \
{answer_language}. Write exactly this, and nothing before or after it:
{tag}
{thinking_open}
(your thinking, in {language})
{thinking_close}

(your answer, in {answer_language})"""


@dataclass(frozen=True)
class Request:
    """One question to a teacher. `language`: to think in, None where the teacher is to choose. attempt: from 0, of this
    question in this language."""

    prompt: Prompt
    language: str | None
    attempt: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.prompt.question_id, self.language or "", self.attempt


class Teacher(Protocol):
    """Replies to requests."""

    at_once: int
    """Requests that it takes at a time without waiting for the first reply."""

    def fitting(self, prompts: Sequence[Prompt], languages: Sequence[str | None]) -> list[Prompt]:
        """The questions that it can be asked in any of `languages` (None: it chooses). Raises DataError, naming them,
        for others that may not be left out, and where nothing is left."""
        ...

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply | None]]:
        """Each request with its reply as it comes, None where a later start may get one; what is left out never has
        one."""
        ...

    def identity(self) -> dict[str, object]:
        """What its replies depend on."""
        ...

    def close(self) -> None: ...


def instruction(language: str, answer_language: str, marks: MarksConfig) -> str:
    """The format in words, in English."""
    return INSTRUCTION.format(
        language=LANGUAGES[language].english,
        answer_language=LANGUAGES[answer_language].english,
        tag=tag(language, marks),
        thinking_open=marks.thinking_open,
        thinking_close=marks.thinking_close,
    )


class EndpointTeacher:
    """A model that follows instructions, behind an OpenAI-compatible endpoint."""

    def __init__(
        self,
        url: str,
        model: str,
        marks: MarksConfig,
        *,
        key_env: str | None,
        concurrency: int,
        timeout_s: float,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._endpoint = ChatEndpoint(
            url, model, "--teacher", key_env=key_env, concurrency=concurrency, timeout_s=timeout_s
        )
        self._identity = {"model": model, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        self._marks = marks
        self._concurrency = concurrency
        self.at_once = 8 * concurrency

    def fitting(self, prompts: Sequence[Prompt], languages: Sequence[str | None]) -> list[Prompt]:
        return list(prompts)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply | None]]:
        yield from as_answered(requests, self._reply, self._concurrency)

    def identity(self) -> dict[str, object]:
        return {"teacher": "endpoint", "instruction": INSTRUCTION, **self._identity}

    def close(self) -> None:
        self._endpoint.close()

    def _reply(self, request: Request) -> Reply | None:
        assert request.language is not None
        seed = derive_seed("trace", self._identity["seed"], *request.key) % 2**31
        try:
            return self._endpoint.reply(
                instruction(request.language, request.prompt.language, self._marks),
                request.prompt.question,
                temperature=self._identity["temperature"],
                max_tokens=self._identity["max_tokens"],
                seed=seed,
            )
        except NoReply:
            return None


class FileTeacher:
    """Replies of a JSONL file with question_id, language (to think in) and reply, whoever has written it."""

    def __init__(self, path: Path, samples: int) -> None:
        """samples: of a question in a language, the first of the file. Raises DataError at the first bad row."""
        self.at_once = 4096
        self._path, self._samples = path, samples
        self._replies: dict[tuple[str, str], list[Reply]] = defaultdict(list)
        self._rows: list[tuple[str, str, str, int]] = []
        for where, fields in json_lines(path):
            row = _ReplyRow(where, fields)
            question, language = row.required_text("question_id"), row.required_text("language")
            replies = self._replies[question, language]
            self._rows.append((where, question, language, len(replies)))
            replies.append(row.reply())

    def fitting(self, prompts: Sequence[Prompt], languages: Sequence[str | None]) -> list[Prompt]:
        """All of them. Prints how many replies nobody will ask for, by reason; raises DataError where that is all."""
        known = {prompt.question_id for prompt in prompts}
        found: dict[str, list[str]] = defaultdict(list)
        for where, question, language, attempt in self._rows:
            if question not in known:
                reason = "to no question of --questions (and --limit)"
            elif language not in languages:
                reason = "in no language of --thinking"
            elif attempt >= self._samples:
                reason = "beyond --samples"
            else:
                continue
            found[reason].append(f"{where}, {question!r} in {language!r}")
        told = [f"{len(rows)} {reason}, the first: {rows[0]}" for reason, rows in found.items()]
        if sum(map(len, found.values())) == len(self._rows):
            raise DataError(f"{self._path}: none of the {len(self._rows)} replies can be used. {'; '.join(told)}")
        for line in told:
            print(f"  replies not used: {line}")
        return list(prompts)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply | None]]:
        for request in requests:
            replies = self._replies.get((request.prompt.question_id, request.language or ""), [])
            if request.attempt < len(replies):
                yield request, replies[request.attempt]

    def identity(self) -> dict[str, object]:
        return {"teacher": "file"}

    def close(self) -> None:
        pass


class _ReplyRow(Row):
    def reply(self) -> Reply:
        value = self.required("reply")
        # Nothing said is a reply as well.
        return Reply(value if value == "" else self.text("reply", value))


class NemoTeacher:
    """A local .nemo, which answers as the policy does in training: same prompts, same generation, seeded draws.

    told: the format is explained under the question, for a model that follows instructions; else the tag of the
    thinking language is prefilled, for a policy that knows the format; nothing is where it is to choose by itself.
    """

    def __init__(
        self, config_name: str, overrides: Sequence[str], marks: MarksConfig, *, told: bool, seed: int, scratch: Path
    ) -> None:
        """Opens all but the model, which the first question needs. Raises ConfigError."""
        from nemo_lrpo.actor.platform import ensure_platform

        ensure_platform()
        from nemo_lrpo.actor.setup import check_nemo_sections
        from nemo_lrpo.actor.tokenizer import open_tokenizer
        from nemo_lrpo.config.loader import compose, load_policy_config
        from nemo_lrpo.data.prompts import PromptRenderer

        own = [f"run_dir={scratch}", f"evaluation.out={scratch / 'none.json'}"]
        config = load_policy_config(compose(config_name, [*own, *overrides]))
        check_nemo_sections(config)
        path = str(config.pretrained_checkpoint.restore_from_path)
        self._renderer = PromptRenderer(open_tokenizer(path), config.prompt, prefill(marks))
        self._rooms = ExitStack()
        self._config = config
        self._temperature = config.evaluation.temperature
        self._marks, self._told, self._seed = marks, told, seed
        stat = Path(path).stat()
        self._identity = {
            "model": str(Path(path).absolute()),
            "changed": stat.st_mtime_ns,
            "temperature": self._temperature,
            "max_new_tokens": config.rollout.max_new_tokens,
            "told": told,
            "seed": seed,
        }
        self.at_once = 8 * config.rollout.micro_batch_size

    @cached_property
    def _actor(self) -> MegatronActor:
        from nemo_lrpo.actor.actor import MegatronActor
        from nemo_lrpo.actor.setup import build_policy

        policy = build_policy(self._config, total_updates=1, resume_from=None, training=False)
        self._rooms.callback(policy.logger.finalize)
        return MegatronActor(policy, self._config)

    def fitting(self, prompts: Sequence[Prompt], languages: Sequence[str | None]) -> list[Prompt]:
        """By prompt.max_tokens and prompt.over_long, as in training; see PromptRenderer."""
        named = [language for language in languages if language]
        asked = [
            replace(prompt, question=self._longest(prompt, named), fixed_language=prompt.language) for prompt in prompts
        ]
        kept = {one.question_id for one in self._renderer.fitting(asked, (), () if self._told else named)}
        return [prompt for prompt in prompts if prompt.question_id in kept]

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Reply | None]]:
        prompts = [self._prompt(request) for request in requests]
        seeds = [derive_seed("trace", self._seed, *request.key) for request in requests]
        rollouts = self._actor.generate(prompts, seeds, lambda _: None, self._temperature)
        texts = self._actor.decode(rollouts, range(len(prompts)))
        for request, prompt, text, ended in zip(requests, prompts, texts, rollouts.ended.tolist(), strict=True):
            yield request, Reply(prompt.prefilled + text, ended)

    def identity(self) -> dict[str, object]:
        return {"teacher": "nemo", "instruction": INSTRUCTION, **self._identity}

    def close(self) -> None:
        self._rooms.close()

    def _question(self, prompt: Prompt, language: str | None) -> str:
        """As it is asked."""
        if not self._told or language is None:
            return prompt.question
        return f"{prompt.question}\n\n{instruction(language, prompt.language, self._marks)}"

    def _longest(self, prompt: Prompt, languages: Sequence[str]) -> str:
        """The question as it is asked with the most tokens."""
        if not self._told or not languages:
            return prompt.question
        return max(
            (self._question(prompt, language) for language in languages),
            key=lambda text: len(self._renderer.tokens_of(text)),
        )

    def _prompt(self, request: Request) -> TaggedPrompt:
        prompt, language = request.prompt, request.language
        prompt = replace(prompt, question=self._question(prompt, language))
        thinking = None if self._told else language
        routed = RoutedPrompt(prompt, -1, request.attempt, prompt.language, ORIGIN_FIXED, 1.0, thinking=thinking)
        return self._renderer.render(routed)
