"""Configurations of server and client that cannot work are refused with key, value and remedy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import compose, to_dataclass
from nemo_lrpo.config.reward import RewardClientConfig, RewardServerConfig, parse_endpoint, read_token
from nemo_lrpo.serving.endpoint import Endpoint


@pytest.fixture(autouse=True)
def no_token_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRPO_REWARD_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["reward.endpoint_file", "reward.endpoint"]),
        ({"endpoint": "h:1", "endpoint_file": "f"}, ["reward.endpoint_file", "not both"]),
        ({"endpoint": "h"}, ["reward.endpoint='h'", "host:port"]),
        ({"endpoint": "h:0"}, ["reward.endpoint='h:0'", "host:port"]),
        ({"endpoint": "::1:8010"}, ["reward.endpoint='::1:8010'", "[::1]:8010"]),
        ({"endpoint": ["h:1", "h"]}, ["reward.endpoint[1]='h'", "host:port"]),
        ({"endpoint": ["h:1", "h:1"]}, ["reward.endpoint=", "different strings"]),
        ({"endpoint_file": []}, ["reward.endpoint_file=[]", "a list"]),
        ({"endpoint_file": ["f", None]}, ["reward.endpoint_file=['f', None]"]),
        ({"endpoint_file": 7}, ["reward.endpoint_file=7", "a string"]),
        ({"endpoint_file": "f", "max_outstanding_texts": 63}, ["reward.max_outstanding_texts=63", ">= 64"]),
        ({"endpoint_file": "f", "deadline_s": 0.0}, ["reward.deadline_s=0.0", "> 0.0"]),
        ({"endpoint_file": "f", "deadline_s": math.inf}, ["reward.deadline_s=inf"]),
        ({"endpoint_file": "f", "connect_timeout_s": math.nan}, ["reward.connect_timeout_s=nan"]),
        ({"endpoint_file": "f", "concurrency": 0}, ["reward.concurrency=0", ">= 1"]),
        ({"endpoint_file": "f", "max_missing_share": 1.5}, ["reward.max_missing_share=1.5", "<= 1.0"]),
        ({"endpoint_file": "f", "token_file": "nowhere"}, ["reward.token_file='nowhere'", "no such file"]),
    ],
)
def test_bad_client(changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        RewardClientConfig(**changes).check("reward")
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics_port": 70000}, "metrics_port=70000"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_pending": 0}, "max_pending=0"),
        ({"host": "[::1]"}, r"host='\[::1\]'.*without brackets"),
    ],
)
def test_bad_server(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RewardServerConfig(**changes).check()


def test_replicas_are_named_by_their_place() -> None:
    assert RewardClientConfig(endpoint_file="a").sources() == [("reward.endpoint_file", "a")]
    assert RewardClientConfig(endpoint=["h:1", "h:2"]).sources() == [
        ("reward.endpoint[0]", "h:1"),
        ("reward.endpoint[1]", "h:2"),
    ]


def test_a_list_of_replicas_from_the_command_line() -> None:
    (tree,) = [compose("train", ["reward.endpoint_file=[a.json,b.json]"]).reward]
    config = to_dataclass(RewardClientConfig, tree, "reward")
    config.check("reward")
    assert [value for _, value in config.sources()] == ["a.json", "b.json"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node17"])
def test_beyond_loopback_needs_a_token(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="token_file.*LRPO_REWARD_TOKEN"):
        RewardServerConfig(host=host).check()
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    RewardServerConfig(host=host, token_file=str(token)).check()
    monkeypatch.setenv("LRPO_REWARD_TOKEN", "secret")
    RewardServerConfig(host=host).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    RewardServerConfig(host=host).check()


def test_token_files_that_are_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(" \n")
    token.chmod(0o600)
    with pytest.raises(ConfigError, match="k=.*is empty"):
        read_token("k", str(token))
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token("k", str(token))


def test_a_token_without_room_in_a_request_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("ß" * 1024)
    token.chmod(0o600)
    assert read_token("k", str(token)) == "ß" * 1024
    token.write_text("x" * 1025)
    with pytest.raises(ConfigError, match="k='.*token of 1025 characters; at most 1024"):
        read_token("k", str(token))
    monkeypatch.setenv("LRPO_REWARD_TOKEN", "x" * 1025)
    with pytest.raises(ConfigError, match="LRPO_REWARD_TOKEN gives"):
        read_token("k", None)


def test_addresses() -> None:
    assert parse_endpoint("k", "node17:8010") == ("node17", 8010)
    assert parse_endpoint("k", "[::1]:8010") == ("::1", 8010)
    assert Endpoint("::1", 8010).address == "[::1]:8010"


def test_an_endpoint_file_is_read_back_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "reward.json"
    endpoint = Endpoint("127.0.0.1", 8010, 42, "/run/token", 9100)
    endpoint.write(path)
    assert Endpoint.read(path) == endpoint
    assert [file.name for file in path.parent.iterdir()] == ["reward.json"]
    for text in ("", "{}", "[]", '{"host": "h", "port": "1"}', '{"host": "h", "port": 1, "what": 2}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="reward.json is no endpoint file"):
            Endpoint.read(path)
