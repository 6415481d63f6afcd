"""Who writes the traces: a model behind an endpoint, a local .nemo, or a file of replies that are there already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.data.languages import LANGUAGES
from nemo_lrpo.data.rows import Row, json_lines
from nemo_lrpo.explang.format import forced, tag
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.types import ORIGIN_FIXED, Prompt, RoutedPrompt, TaggedPrompt
from tools.preparation.endpoint import ChatEndpoint, NoReply, Reply, as_answered

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

    def __init__(self, path: Path) -> None:
        """Raises DataError at the first bad row."""
        self.at_once = 4096
        self._replies: dict[tuple[str, str], list[Reply]] = defaultdict(list)
        for where, fields in json_lines(path):
            row = _ReplyRow(where, fields)
            self._replies[row.required_text("question_id"), row.required_text("language")].append(row.reply())

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
        """Loads the model. Raises ConfigError."""
        from nemo_lrpo.actor.platform import ensure_platform

        ensure_platform()
        from nemo_lrpo.actor.actor import MegatronActor
        from nemo_lrpo.actor.setup import build_policy, check_nemo_sections
        from nemo_lrpo.actor.tokenizer import open_tokenizer
        from nemo_lrpo.config.loader import compose, load_policy_config
        from nemo_lrpo.data.prompts import Prefill, PromptRenderer

        own = [f"run_dir={scratch}", f"evaluation.out={scratch / 'none.json'}"]
        config = load_policy_config(compose(config_name, [*own, *overrides]))
        check_nemo_sections(config)
        path = str(config.pretrained_checkpoint.restore_from_path)
        prefill = Prefill(lambda language: forced(language, marks), marks.thinking_open)
        self._renderer = PromptRenderer(open_tokenizer(path), config.prompt, prefill)
        self._rooms = ExitStack()
        policy = build_policy(config, total_updates=1, resume_from=None, training=False)
        self._rooms.callback(policy.logger.finalize)
        self._actor = MegatronActor(policy, config)
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

    def _prompt(self, request: Request) -> TaggedPrompt:
        prompt, language = request.prompt, request.language
        if self._told and language:
            told = instruction(language, prompt.language, self._marks)
            prompt = replace(prompt, question=f"{prompt.question}\n\n{told}")
        thinking = None if self._told else language
        routed = RoutedPrompt(prompt, -1, request.attempt, prompt.language, ORIGIN_FIXED, 1.0, thinking=thinking)
        return self._renderer.render(routed)
