"""`reward` of a training run, and the configuration of the reward server (`conf/serve_rewards.yaml`)."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from nemo_lrpo.config.checks import ConfigError, check_file, check_range
from nemo_lrpo.config.scoring import ScorerConfig


@dataclass
class RewardServerConfig:
    """Where the server listens, whom it answers and how much it takes at once."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a token. Token and texts travel unencrypted: listen on the
    interface of the job's own network rather than on all (0.0.0.0)."""
    port: int = 0
    """gRPC port; 0 picks a free one."""
    port_tries: int = 1
    """Ports tried from `port` on, one after the other, until one can be bound; the endpoint file says which it was."""
    metrics_port: Optional[int] = None
    """HTTP port, on `host`, for Prometheus (/metrics) and health (/healthz, /readyz); 0 picks a free one, unset: none.
    Where there is a token, it is wanted there too (Authorization: Bearer)."""
    advertise_host: Optional[str] = None
    """Name or address that the endpoint file gives to clients; unset: `host`, or this machine's name where `host` is
    0.0.0.0 or ::."""
    endpoint_file: Optional[str] = None
    """JSON file with host, ports, process id and token file, written when the server is ready, removed when it ends."""
    token_file: Optional[str] = None
    """File with the token that every request must carry; unset: the variable LRPO_REWARD_TOKEN, or none."""
    concurrency: int = 4
    """Requests scored at once: while one is encoded, others are read, tokenised and identified."""
    max_pending: int = 64
    """Requests that wait for one of these places; further ones are told when to come back."""
    max_texts_per_request: int = 1024
    """Samples in one request; more are refused."""
    max_text_chars: int = 65536
    """Characters of one response, reference or question. Clients send none that is longer: such an answer has no
    reward, and is counted. Replicas must agree about it."""
    max_request_bytes: int = 33554432
    """Size of one request; a larger one is refused unparsed, so clients cut theirs."""
    triton_log: Optional[str] = None
    """File for the log of Triton itself; unset: kept while the server runs, and printed if it does not start."""
    exit_timeout_s: int = 3
    """Time for requests in progress when the server is told to end."""

    def check(self, key: str = "") -> None:
        """Raise ConfigError unless a server can listen so. `key` is the section's name, empty at the top level."""
        at = f"{key}." if key else ""
        check_range(f"{at}port", self.port, at_least=0, at_most=65535)
        check_range(f"{at}port_tries", self.port_tries, at_least=1)
        if self.metrics_port is not None:
            check_range(f"{at}metrics_port", self.metrics_port, at_least=0, at_most=65535)
        if "[" in self.host:
            raise ConfigError(f"{at}host={self.host!r}: an IPv6 address without brackets, please, for example ::1.")
        if not is_loopback(self.host) and read_token(f"{at}token_file", self.token_file) is None:
            raise ConfigError(
                f"{at}host={self.host!r} listens beyond loopback, which needs a token: set {at}token_file or the "
                "environment variable LRPO_REWARD_TOKEN."
            )
        read_token(f"{at}token_file", self.token_file)
        limits = ("concurrency", "max_pending", "max_texts_per_request", "max_text_chars", "max_request_bytes")
        for name in (*limits, "exit_timeout_s"):
            check_range(f"{at}{name}", getattr(self, name), at_least=1)
        if self.triton_log and any(character.isspace() for character in self.triton_log):
            raise ConfigError(
                f"{at}triton_log={self.triton_log!r} contains white space, which Triton's command refuses."
            )


@dataclass
class ServeRewardsConfig(ScorerConfig, RewardServerConfig):
    """The whole of `conf/serve_rewards.yaml`: what is scored with, and the server around it."""

    def check(self, key: str = "") -> None:
        """Raise ConfigError for what cannot be served. Loads nothing."""
        RewardServerConfig.check(self, key)
        ScorerConfig.check(self, key)


@dataclass
class RewardClientConfig:
    """`reward`: how a run reaches the reward server, and what it accepts from it."""

    endpoint_file: Any = None
    """File that the server publishes, or a list of such files, one for each replica; read anew for every connection, so
    that a restarted server is found again."""
    endpoint: Any = None
    """host:port of the server, or a list of them, in place of endpoint_file."""
    token_file: Optional[str] = None
    """File with the servers' token; unset: the one named by endpoint_file, then the variable LRPO_REWARD_TOKEN."""
    deadline_s: float = 600.0
    """Seconds from submitting samples to their scores; no call takes longer. A replica that says nothing for half of
    what is left of it is left out, and another one asked."""
    connect_timeout_s: float = 60.0
    """Seconds for which servers are tried again while none can be reached, within the deadline, counted from the loss
    of the last one."""
    startup_timeout_s: float = 300.0
    """Seconds to wait at the start of a run until a server is ready."""
    max_texts_per_request: int = 64
    """Samples per request; a submission is cut into requests of this size, which travel at once."""
    concurrency: int = 4
    """Requests on their way at once, for each replica."""
    max_outstanding_texts: int = 8192
    """Samples submitted and not scored yet; where there are more, submitting waits, at most until its deadline."""
    max_missing_share: float = 0.1
    """A step with a larger share of samples without reward is refused; below it they are masked and counted."""
    encoder: Optional[str] = None
    """Identity (sha256:...) that the server's encoder must have; unset: any."""

    def check(self, key: str) -> None:
        """Raise ConfigError unless the values make a client. Whether a server answers is seen when the run starts."""
        if (self.endpoint is None) == (self.endpoint_file is None):
            raise ConfigError(
                f"set one of {key}.endpoint_file (written by nemo_lrpo.serve_rewards) and {key}.endpoint (host:port), "
                f"not {'both' if self.endpoint else 'none'}."
            )
        sources = self.sources(key)
        values = [value for _, value in sources]
        if not values or not all(isinstance(v, str) and v for v in values) or len(set(values)) != len(values):
            name = "endpoint" if self.endpoint is not None else "endpoint_file"
            raise ConfigError(
                f"{key}.{name}={getattr(self, name)!r}; give a string, or a list of different strings, one for each "
                "replica."
            )
        if self.endpoint is not None:
            for name, value in sources:
                parse_endpoint(name, value)
        read_token(f"{key}.token_file", self.token_file)
        for name in ("deadline_s", "connect_timeout_s", "startup_timeout_s"):
            check_range(f"{key}.{name}", getattr(self, name), above=0.0, below=float("inf"))
        for name in ("max_texts_per_request", "concurrency"):
            check_range(f"{key}.{name}", getattr(self, name), at_least=1)
        check_range(f"{key}.max_outstanding_texts", self.max_outstanding_texts, at_least=self.max_texts_per_request)
        check_range(f"{key}.max_missing_share", self.max_missing_share, at_least=0.0, at_most=1.0)

    def sources(self, key: str = "reward") -> list[tuple[str, Any]]:
        """Where each replica is found: the key that says so, with its place in a list, and the value there."""
        name = "endpoint" if self.endpoint is not None else "endpoint_file"
        value = getattr(self, name)
        if isinstance(value, (list, tuple)):
            return [(f"{key}.{name}[{place}]", each) for place, each in enumerate(value)]
        return [(f"{key}.{name}", value)]


def is_loopback(host: str) -> bool:
    """True where `host` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_endpoint(key: str, value: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not bracketed):
        raise ConfigError(f"{key}={value!r} is not host:port, for example 127.0.0.1:8010 or [::1]:8010.")
    return host.strip("[]"), int(port)


_MAX_TOKEN_CHARS = 1024


def read_token(key: str, token_file: Optional[str]) -> Optional[str]:
    """The token in `token_file`, else that of LRPO_REWARD_TOKEN, else None.

    Raises ConfigError for a file that is absent, empty or readable by other users, and for a token beyond 1024
    characters, which has no room in the head of a request.
    """
    if token_file is None:
        return _fitting("LRPO_REWARD_TOKEN", os.environ.get("LRPO_REWARD_TOKEN", "")) or None
    path: Path = check_file(key, token_file, "write a token into it (for example: openssl rand -hex 32)")
    if path.stat().st_mode & 0o007:
        raise ConfigError(f"{key}={token_file!r} can be read by every user of this machine; chmod 600 it.")
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"{key}={token_file!r} is empty; write a token into it (for example: openssl rand -hex 32).")
    return _fitting(f"{key}={token_file!r}", token)


def _fitting(source: str, token: str) -> str:
    if len(token) > _MAX_TOKEN_CHARS:
        raise ConfigError(
            f"{source} gives a token of {len(token)} characters; at most {_MAX_TOKEN_CHARS} are accepted."
        )
    return token
