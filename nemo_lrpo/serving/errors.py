"""What can go wrong between a training run and its reward server. Each message names the server and the remedy."""


class RewardError(RuntimeError):
    """Base of all errors of the reward service."""


class RewardServerUnavailable(RewardError):
    """No server answers at the endpoint."""


class RewardDeadlineExceeded(RewardError):
    """The server is there but did not finish within `deadline_s`."""


class RewardServerMismatch(RewardError):
    """The server is not the one that this run needs: other schema version, languages, limits or identity."""


class RewardRequestRefused(RewardError):
    """The server refused the request: wrong token, too many or too long texts, malformed."""


class RewardServerFailed(RewardError):
    """The server could not start, died, or failed while scoring; its log says why."""


class WireError(ValueError):
    """Bytes that are no message of the wire schema. `kind` is one of the ERROR_* constants of the schema."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
