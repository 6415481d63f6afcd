"""Serve rewards to training runs.

    python -m nemo_lrpo.serve_rewards encoder.path=encoder calibration.path=statistics.json \\
        endpoint_file=run/reward.json

Runs until SIGTERM or Ctrl-C. `--help` prints the whole configuration.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType

import hydra
from omegaconf import DictConfig

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.loader import CONFIG_DIR, to_dataclass
from nemo_lrpo.config.reward import ServeRewardsConfig

log = logging.getLogger("nemo_lrpo.serve_rewards")


def load_config(tree: DictConfig) -> ServeRewardsConfig:
    """The server's configuration, typed and checked. Raises ConfigError before any model is loaded."""
    config = to_dataclass(ServeRewardsConfig, tree)
    config.check()
    return config


def run(config: ServeRewardsConfig) -> None:
    """Load the models, serve until the first SIGTERM, SIGINT or SIGUSR1, end cleanly."""
    stop = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        # A second SIGTERM or SIGINT ends the process at once; a job's SIGUSR1 may come when it is about to end anyway.
        signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        stop.set()

    # Of these srun passes only SIGUSR1 on; it kills the tasks of a step that is told to end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, end)
    log.info("loading the encoder and the language identifier")
    from nemo_lrpo.rewards.scorer import RewardScorer
    from nemo_lrpo.serving.server import RewardServer

    scorer = RewardScorer(config)
    server = RewardServer(config, scorer)
    try:
        if not stop.is_set():
            endpoint = server.start()
            log.info("ready at %s, process %d", endpoint.address, os.getpid())
            if endpoint.metrics_port is not None:
                log.info("metrics and health at port %d", endpoint.metrics_port)
            server.wait(stop)
    finally:
        server.stop()
        scorer.close()
    log.info("ended")


@hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name="serve_rewards")
def main(tree: DictConfig) -> None:
    """Entry point: one readable line for what the user can mend, a traceback for what they cannot."""
    from nemo_lrpo.serving.errors import RewardError

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("nemo_lrpo").setLevel(logging.INFO)
    try:
        run(load_config(tree))
    except (ConfigError, RewardError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
