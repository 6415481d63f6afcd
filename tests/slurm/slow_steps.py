"""nemo_lrpo.train whose steps take a while, without work, as long as the file named by SLOW_STEPS is there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from nemo_lrpo.train import main
from nemo_lrpo.training.trainer import LrpoTrainer

if __name__ == "__main__":
    step = LrpoTrainer.step

    def slow_step(self: LrpoTrainer, *arguments: Any) -> Any:
        if Path(os.environ["SLOW_STEPS"]).exists():
            time.sleep(4)
        return step(self, *arguments)

    LrpoTrainer.step = slow_step
    main()
