"""The endpoint file: how a training run finds its reward server."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Endpoint:
    """Where a ready server listens. `token_file`: absolute path, None where requests need no token (or take it from
    the environment). `pid`: of the server's process on its own machine, None where only host and port are known.
    `metrics_port`: of the HTTP port for health and metrics, None where there is none."""

    host: str
    port: int
    pid: int | None = None
    token_file: str | None = None
    metrics_port: int | None = None

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def write(self, path: Path) -> None:
        """Publish atomically: a reader sees the old file, the new one or none, never half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Endpoint:
        """Raises FileNotFoundError, or ValueError for a file that is no endpoint file."""
        text = path.read_text(encoding="utf-8")
        try:
            endpoint = cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no endpoint file of nemo_lrpo.serve_rewards ({error})") from None
        if not isinstance(endpoint.host, str) or not isinstance(endpoint.port, int):
            raise ValueError(f"{path} is no endpoint file of nemo_lrpo.serve_rewards (host or port is missing)")
        return endpoint
