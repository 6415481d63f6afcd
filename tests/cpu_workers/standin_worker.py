"""One rank of the stand-in's end-to-end test; writes what it saw to a JSON file.

`build` makes the actor from a configuration and saves it before training; `resume` opens what `build` saved, in
whatever layout it is started with.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import tiny_actor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["build", "resume"])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    arguments = parser.parse_args()

    from nemo_lrpo.actor.platform import ensure_platform

    accelerator = ensure_platform()

    import torch
    from megatron.core import tensor_parallel
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import MegatronGPTReinforceActorModel
    from nemo_aligner.utils.train_script_utils import (
        add_custom_checkpoint_callback,
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_using_ptl,
        resolve_and_create_trainer,
    )
    from nemo_aligner.utils.utils import load_and_override_model_config, load_from_nemo

    base = str(arguments.workdir / "base.nemo")
    ranks = int(os.environ["WORLD_SIZE"])
    cfg = tiny_actor.config(
        arguments.workdir, ranks, arguments.tensor, arguments.pipeline, experiment=arguments.experiment
    )
    if arguments.mode == "resume":
        cfg.model = load_and_override_model_config(base, cfg.model)
    trainer = resolve_and_create_trainer(cfg, "reinforce")
    exp_manager(trainer, cfg.exp_manager)
    if arguments.mode == "build":
        model = MegatronGPTReinforceActorModel(cfg.model, trainer)
    else:
        model = load_from_nemo(MegatronGPTReinforceActorModel, cfg.model, trainer, strict=True, restore_path=base)
    init_distributed(trainer, model, False)

    seen: dict[str, Any] = {"accelerator": accelerator, "backend": torch.distributed.get_backend()}
    probe = tiny_actor.tokens(2, seed=2)
    seen["saved"] = log_probs(model, probe)
    if arguments.mode == "build":
        model.save_to(base)

    dataset = list(range(64))
    init_using_ptl(trainer, model, torch.utils.data.DataLoader(dataset, batch_size=4), dataset)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    checkpoints = add_custom_checkpoint_callback(trainer, model)
    seen["optimizer"] = type(optimizer).__name__
    seen["resumed_from"] = trainer.ckpt_path and Path(trainer.ckpt_path).name

    rollouts = [None] * ranks
    torch.distributed.all_gather_object(rollouts, tiny_actor.generate(model).tolist())
    seen["rollouts"] = rollouts

    replica_ranks = ranks // (arguments.tensor * arguments.pipeline)
    replica = torch.distributed.get_rank() // arguments.tensor % replica_ranks
    if arguments.mode == "build":
        seen["first"] = tiny_actor.train_step(model, optimizer, scheduler, replica, replica_ranks)
        seen["trained"] = log_probs(model, probe)
        save(checkpoints, step=1)
    else:
        seen["trained"] = log_probs(model, probe)
    seen["second"] = tiny_actor.train_step(model, optimizer, scheduler, replica, replica_ranks)
    seen["after"] = log_probs(model, probe)
    seen["steps"] = [group["step"] for group in optimizer.param_groups]
    if arguments.mode == "resume":
        save(checkpoints, step=2)
    seen["compiled"] = compiled_functions()
    seen["random_states"] = sorted(tensor_parallel.get_cuda_rng_tracker().get_states())
    if torch.distributed.get_rank() == 0:
        arguments.result.write_text(json.dumps(seen))


def log_probs(model: Any, probe: Any) -> list[list[float]]:
    """Of `probe` under the present weights; float [2, SEQUENCE - 1]."""
    import torch
    from nemo_aligner.utils.distributed import broadcast_2d_tensor_within_pp

    model.prepare_for_inference()
    found = broadcast_2d_tensor_within_pp(model.get_inference_log_probs(probe), dtype=torch.float32)
    model.finish_inference()
    return found.tolist()


def save(checkpoints: Any, step: int) -> None:
    import torch

    checkpoints.custom_save(
        monitor_candidates={
            "step": torch.tensor(step, dtype=torch.int32),
            "consumed_samples": torch.tensor(4 * step),
            "epoch": torch.tensor(0),
            "reinforce_optimization_step": torch.tensor(step),
            "val_rewards": torch.tensor(0.1 * step),
        },
        is_train_end=False,
    )


def compiled_functions() -> list[str]:
    """Megatron's fused functions that torch.compile turned into something else than a plain function."""
    from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu

    functions = [fused_bias_swiglu.swiglu, fused_bias_swiglu.swiglu_back]
    functions += [fused_bias_dropout.bias_dropout_add_fused_train, fused_bias_dropout.bias_dropout_add_fused_inference]
    return [function.__name__ for function in functions if hasattr(function, "_torchdynamo_orig_callable")]


if __name__ == "__main__":
    main()
