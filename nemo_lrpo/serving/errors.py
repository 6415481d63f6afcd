"""What can go wrong between a training run and its reward server. Each message names the server and the remedy."""

from __future__ import annotations

from nemo_lrpo.config.checks import ConfigError


class RewardError(RuntimeError):
    """Base of all errors of the reward service."""


class RewardServerUnavailable(RewardError):
    """No server answers at the endpoint."""


class RewardDeadlineExceeded(RewardError):
    """The server is there but did not finish within `deadline_s`."""


class RewardServerMismatch(RewardError):
    """The server is not the one that this run needs (other schema version, languages, limits or identity), or two
    replicas would not give the same rewards."""


class RewardRequestRefused(RewardError):
    """The server refused the request: wrong token, malformed, or beyond a limit."""


class RewardCancelled(RewardError):
    """Nobody waits for the scores any more: the future was cancelled, or its client closed."""


class RewardServerFailed(RewardError):
    """The server could not start, died, or failed while scoring; its log says why."""


MISTAKES = (RewardRequestRefused, RewardServerMismatch, ConfigError)
"""What no other replica and no second try mends: token, configuration, version."""


class WireError(ValueError):
    """A message that is none of the wire schema, or that is refused. `kind` is one of the ERROR_* constants of the
    schema; `retry_after_s`, in seconds, is given where it may be sent again."""

    def __init__(self, kind: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
