"""A real reward server whose rewards are hashes of the texts, so that any client knows what is right. It may lie:

python hash_server.py endpoint_file=reward.json [lies=0.3] [delay_s=0.1] [name=x] [tagged=1] \
    [KEY=VALUE of RewardServerConfig]

tagged: as for mode=explang; a response that begins with a tag has chosen its language, any other what its hash says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

from nemo_lrpo.config.explang import MarksConfig
from nemo_lrpo.config.reward import RewardServerConfig
from nemo_lrpo.serving import schema
from nemo_lrpo.serving.server import RewardServer
from nemo_lrpo.types import Score, ScoreRequest, ScoringAbandoned

LANGUAGES = ["de", "en", "ja"]


def hashed_reward(request: ScoreRequest) -> float:
    """In [0, 1), of everything in the request."""
    text = "\0".join(str(value) for value in dataclasses.asdict(request).values())
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / 2**48


def tagged_score(request: ScoreRequest) -> Score:
    """Gate and quality 0 or 1; one in four that chose by itself has no tag."""
    draw = random.Random(hashed_reward(request))
    gate, quality, language, none = draw.randrange(2), draw.randrange(2), draw.choice(LANGUAGES), draw.randrange(4) == 0
    forced = re.match("<lang_select>(..)</lang_select>\n", request.response)
    if none and not forced:
        return Score(request.sample_id, 0.0, 0.0, 0.0, None, 0.0, flags=("defect:no_tag",))
    flag = f"selected:{forced[1] if forced else language}"
    return Score(
        request.sample_id, float(gate * quality), float(quality), float(gate), request.language, 0.9, flags=(flag,)
    )


class HashScorer:
    """`delay_s`: seconds for one request, spent in slices of 10 ms."""

    def __init__(self, name: str, delay_s: float, tagged: bool = False):
        self._tagged = tagged
        self._name = name
        self._delay_s = delay_s
        self._abandoned = 0

    def score(self, requests: list[ScoreRequest], should_stop: Callable[[], bool]) -> list[Score]:
        ends = time.monotonic() + self._delay_s
        while time.monotonic() < ends:
            if should_stop():
                self._abandoned += 1
                raise ScoringAbandoned
            time.sleep(0.01)
        if any(request.response == "crash" for request in requests):
            raise ArithmeticError("the encoder fell over")
        if self._tagged:
            return [tagged_score(r) for r in requests]
        return [Score(r.sample_id, reward := hashed_reward(r), reward, 1.0, r.language, 0.99) for r in requests]

    def identity(self) -> dict[str, object]:
        thinking = {"thinking": dataclasses.asdict(MarksConfig())} if self._tagged else {}
        return {"languages": LANGUAGES, "encoder": f"sha256:{self._name}", "gate": {"kind": self._name}, **thinking}

    def healthy(self) -> bool:
        return True

    def counts(self) -> dict[str, float]:
        return {"abandoned": float(self._abandoned), "scored/de": 1.0}


def lie(reply: bytes, draw: random.Random) -> bytes:
    """A score reply, spoilt in one of the ways that a broken or foreign server might."""
    message = json.loads(reply)
    scores = message["scores"]
    kind = draw.randrange(8)
    if kind == 0:
        scores.append({**scores[0], "sample_id": "9/foreign/0"})
    elif kind == 1:
        del scores[draw.randrange(len(scores)) :]
    elif kind == 2:
        draw.choice(scores)["reward"] = float("nan")
    elif kind == 3:
        # Rows mixed up: every id is there once, with the reward of another.
        ids = [score["sample_id"] for score in scores]
        for score, sample_id in zip(scores, ids[1:] + ids[:1]):
            score["sample_id"] = sample_id
    elif kind == 4:
        scores.append({**draw.choice(scores), "reward": 0.5})
    elif kind == 5:
        message["request_id"] = "another"
        for score in scores:
            score["reward"] = 0.5
    elif kind == 6:
        draw.choice(scores)["reward"] = 1.5
    else:
        draw.choice(scores).pop("gate")
    draw.shuffle(scores)
    return json.dumps(message).encode()


def main() -> None:
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    lies, delay_s = float(settings.pop("lies", 0)), float(settings.pop("delay_s", 0))
    scorer = HashScorer(settings.pop("name", "hash"), delay_s, bool(settings.pop("tagged", "")))
    config = RewardServerConfig(
        **{key: json.loads(value) if value.isdecimal() else value for key, value in settings.items()}
    )
    config.check()
    if lies:
        honest, draw, lock = schema.encode_scores, random.Random(0), threading.Lock()

        def encode_scores(job: schema.ScoreJob, scores: list[Score]) -> bytes:
            reply = honest(job, scores)
            with lock:
                return lie(reply, draw) if scores and draw.random() < lies else reply

        schema.encode_scores = encode_scores
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with RewardServer(config, scorer) as server:
        server.wait(stop)


if __name__ == "__main__":
    main()
