"""The answers of an evaluation on the disk: kept batch by batch, gone on from, never mixed with those of another one.

Beside `<name>.json`, the metrics: `<name>.jsonl`, an answer a line, and `<name>.settings.json`, what they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.training.evaluation import Answer, AnswerKey
from nemo_lrpo.training.scoring import is_missing

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


class AnswerFile:
    """The files of one evaluation. `kept` are the answers of earlier starts that are whole and have their scores."""

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, object],
        understand: Callable[[Mapping[str, Any]], Answer],
        *,
        overwrite: bool,
        writes: bool,
        samples: int = 1,
    ):
        """settings: by name, what the answers depend on. understand: a line's object as an answer, KeyError or
        TypeError for what is none. writes: on the one rank that does; the others read alike. samples: wanted of each
        question; where there are fewer, those are kept. Raises ConfigError where there are answers by other settings or
        more of a question, unless `overwrite`, which drops them."""
        self.path = out.with_suffix(".jsonl")
        self._settings = out.with_suffix(".settings.json")
        self._writes = writes
        self._samples = samples
        self.kept: dict[AnswerKey, Answer] = {}
        self._file = None
        lines = self._kept_lines(settings, understand, overwrite)
        if writes:
            out.parent.mkdir(parents=True, exist_ok=True)
            # The settings first: without answers they bind nothing.
            write_whole(self._settings, json.dumps(settings, indent=1, sort_keys=True))
            write_whole(self.path, b"".join(lines))
            self._file = self.path.open("a", encoding="utf-8")

    def append(self, task: str, answers: Iterable[Answer]) -> None:
        """Keep a batch; on the disk when this returns."""
        if self._file is not None:
            for answer in answers:
                self._file.write(json.dumps(answer.record(task), ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _kept_lines(
        self, settings: Mapping[str, object], understand: Callable[[Mapping[str, Any]], Answer], overwrite: bool
    ) -> list[bytes]:
        if not self.path.exists():
            return []
        differing = self._differing(settings)
        if differing:
            if overwrite:
                return []
            raise ConfigError(
                f"{self.path} holds answers that differ in {', '.join(differing)}; they are not mixed. Give another "
                "evaluation.out, or replace them with evaluation.overwrite=true."
            )
        lines = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
                answer = understand(record)
            except (ValueError, KeyError, TypeError):
                # The last line of a start that was killed while it wrote.
                continue
            # What has no score is asked again.
            if not line.endswith(b"\n") or is_missing(answer.score):
                continue
            if answer.slot >= self._samples:
                if overwrite:
                    continue
                raise ConfigError(
                    f"{self.path} holds more than evaluation.samples={self._samples} answers to a question. Give at "
                    "least as many as before, or another evaluation.out, or leave out those above with "
                    "evaluation.overwrite=true."
                )
            self.kept[answer.draw.key(record["task"])] = answer
            lines.append(line)
        return lines

    def _differing(self, settings: Mapping[str, object]) -> list[str]:
        """Names of the settings that are not those of the answers."""
        try:
            old = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ["all settings (it was not written by an evaluation of this kind)"]
        new = json.loads(json.dumps(settings))
        return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def fingerprint(path: Path) -> str:
    """Tells a model's files from those of another, wherever they lie: names, sizes, and samples of their bytes.

    64 samples of 64 kB a file, evenly spaced: an update moves all weights, and reading 140 GB takes minutes.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        name = "" if file == path else file.relative_to(path).as_posix()
        digest.update(json.dumps([name, size]).encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(index * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
                if size <= _SAMPLE_BYTES:
                    break
    return digest.hexdigest()


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file that is there with all of `data`, or as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    partial.replace(path)
