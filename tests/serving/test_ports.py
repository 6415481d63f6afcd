"""The port of a reward server: the first of a range that can be had."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.reward import RewardServerConfig
from nemo_lrpo.serving.server import RewardServer


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


class Launches:
    """In place of Triton: takes a port, or fails where `refuse` says so."""

    def __init__(self, server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[int] = []
        self.refuse: list[int] = []
        self.stolen: list[socket.socket] = []
        monkeypatch.setattr(server, "_launch", self)

    def __call__(self, port: int) -> None:
        self.tried.append(port)
        if port in self.refuse:
            # Between the look and the launch somebody else was quicker.
            thief = socket.socket()
            thief.bind(("127.0.0.1", port))
            thief.listen()
            self.stolen.append(thief)
            raise RuntimeError("the process ended")


def launch(monkeypatch: pytest.MonkeyPatch, **config: int) -> tuple[Launches, RewardServer]:
    server = RewardServer(RewardServerConfig(**config), SimpleNamespace(counts=dict, identity=dict))
    return Launches(server, monkeypatch), server


def test_taken_ports_are_stepped_over(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, server = launch(monkeypatch, port=taken, port_tries=20)
    port = server._launch_on_one_of(server._ports())
    assert taken < port < taken + 20 and launches.tried == [port]


def test_a_port_that_is_lost_at_the_last_moment_is_followed_by_the_next(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, server = launch(monkeypatch, port=taken, port_tries=20)
    launches.refuse = list(range(taken, taken + 5))
    port = server._launch_on_one_of(server._ports())
    assert taken + 5 <= port and launches.tried[-1] == port and len(launches.tried) > 1
    for thief in launches.stolen:
        thief.close()


def test_a_failure_that_is_not_the_ports_is_not_repeated(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RewardServer(RewardServerConfig(port=taken, port_tries=20), SimpleNamespace(counts=dict, identity=dict))
    tried: list[int] = []

    def fail(port: int) -> None:
        tried.append(port)
        raise RuntimeError("no libpython")

    monkeypatch.setattr(server, "_launch", fail)
    with pytest.raises(RuntimeError, match="no libpython"):
        server._launch_on_one_of(server._ports())
    assert len(tried) == 1


def test_without_a_range_the_port_is_the_one_that_was_given(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, server = launch(monkeypatch, port=taken)
    assert server._launch_on_one_of(server._ports()) == taken and launches.tried == [taken]
    with pytest.raises(ConfigError, match="port_tries=0"):
        RewardServerConfig(port_tries=0).check()
