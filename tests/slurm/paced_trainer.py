"""A trainer that only counts: real ranks, real process group, a checkpoint that takes its time. Used where the test is
about the job and not about the training.

nemo_lrpo.rank ... paced_trainer run_dir=DIR +steps=N [+save_s=S] [+exit=CODE]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    options = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: asked.append(received))
    while "reward.endpoint_file" in options and not Path(options["reward.endpoint_file"]).exists() and not asked:
        time.sleep(0.1)
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    rank, state = torch.distributed.get_rank(), Path(options["run_dir"]) / "count.json"
    assert total.item() == int(options["trainer.devices"]) * int(options["trainer.num_nodes"])
    step = json.loads(state.read_text()) if state.exists() else 0
    print(f"rank {rank} goes on after step {step}; port {os.environ['MASTER_PORT']}", flush=True)
    code = 0
    while step < int(options["steps"]):
        time.sleep(0.1)
        step += 1
        stop = torch.tensor([len(asked)])
        torch.distributed.all_reduce(stop)
        if stop.item():
            time.sleep(float(options.get("save_s", 0)))
            code = 75
            break
    if rank == 0:
        state.write_text(json.dumps(step))
        print(f"saved after step {step}", flush=True)
    torch.distributed.barrier()
    sys.exit(code or int(options.get("exit", 0)))


if __name__ == "__main__":
    main()
