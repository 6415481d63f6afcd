"""One process of a parallel layout: rollouts, log-probs and gradients of the actor, for tests to compare.

    python layout_worker.py NEMO OUT TP PP MICRO_BATCH_SIZES       (under torchrun for more than one rank)

Writes OUT/rollouts.safetensors and, for each micro batch size m, OUT/gradients_m: a distributed checkpoint of the
gradients, so that Megatron itself puts the shards of any layout together.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nemo_lrpo.actor.actor import MegatronActor, NonFiniteError, response_mask  # noqa: E402
from nemo_lrpo.actor.setup import build_policy, check_nemo_sections  # noqa: E402
from nemo_lrpo.config.loader import compose  # noqa: E402
from nemo_lrpo.config.schema import TrainConfig  # noqa: E402
from nemo_lrpo.config.training import LoopConfig, PretrainedConfig, RolloutConfig  # noqa: E402
from nemo_lrpo.seeding import derive_seed  # noqa: E402
from nemo_lrpo.types import Prompt, RoutedPrompt, TaggedPrompt, TrainingBatch  # noqa: E402

SEQUENCES = 8


def make_config(nemo: str, out: Path, tensor: int, pipeline: int) -> TrainConfig:
    tree = compose("train")
    model = OmegaConf.to_container(tree.model, resolve=False)
    model.update(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        precision=32,
        megatron_amp_O2=False,
        seed=1,
    )
    trainer = OmegaConf.to_container(tree.trainer)
    trainer.pop("lrpo")
    trainer.update(devices=int(os.environ.get("WORLD_SIZE", "1")), accelerator="cpu", precision=32)
    return TrainConfig(
        run_dir=str(out / "run"),
        pretrained_checkpoint=PretrainedConfig(nemo),
        rollout=RolloutConfig(micro_batch_size=3, max_new_tokens=12, temperature=0.7),
        loop=LoopConfig(prompts_per_step=2, rollouts_per_prompt=4),
        trainer=trainer,
        model=model,
        exp_manager={"create_tensorboard_logger": False},
    )


def make_prompts() -> list[TaggedPrompt]:
    """Two questions of unequal length, four rollouts each, in three languages."""
    tagged = []
    for question in range(2):
        prompt = Prompt(f"q{question}", "?", "!", "de", "de", ("General Knowledge",))
        for slot in range(4):
            routed = RoutedPrompt(prompt, 0, slot, ("de", "de", "ja", "en")[slot], "drawn", 1.0)
            tagged.append(TaggedPrompt(routed, tuple(range(30, 36 + 3 * question))))
    return tagged


def make_batch(vocabulary: int) -> TrainingBatch:
    """A fixed batch of unequal lengths, one sample masked."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([9, 14, 20, 11, 20, 17, 13, 8])
    return TrainingBatch(
        tokens=torch.randint(3, vocabulary, (SEQUENCES, 20), generator=generator),
        prompt_lengths=torch.tensor([4, 4, 4, 4, 7, 7, 7, 7]),
        lengths=lengths,
        advantages=torch.tensor([1.0, -0.5, 0.25, -0.75, 0.5, 1.5, -2.0, 9.0]),
        use=torch.tensor([True] * 7 + [False]),
    )


def whole_gradients(model: torch.nn.Module) -> None:
    """Fill every rank's gradient buffer: the distributed optimizer leaves each with its own shard reduced."""
    group = parallel_state.get_data_parallel_group()
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    for chunk in model.model:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(ranks)
                torch.distributed.all_gather(list(shards), shards[rank].clone(), group=group)


def save_gradients(model: torch.nn.Module, directory: Path) -> None:
    """Write the gradients in the layout of the parameters."""
    whole_gradients(model)
    gradients = {parameter.data_ptr(): parameter.main_grad for parameter in model.parameters()}
    sharded = {}
    for name, entry in model.sharded_state_dict().items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data.data_ptr() in gradients:
            entry.data = gradients[entry.data.data_ptr()].view(entry.data.shape)
            sharded[name] = entry
    if torch.distributed.get_rank() == 0:
        directory.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded, str(directory))


def refuses_non_finite(actor: MegatronActor, model: torch.nn.Module, batch: TrainingBatch) -> bool:
    """Whether a batch with a NaN stops before any weight or optimizer state has moved."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch.advantages[2] = torch.nan
    try:
        actor.update(batch)
    except NonFiniteError:
        return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    return False


def main() -> None:
    nemo, out, tensor, pipeline, sizes = sys.argv[1:]
    out_dir = Path(out)
    config = make_config(nemo, out_dir, int(tensor), int(pipeline))
    check_nemo_sections(config)
    policy = build_policy(config, total_updates=1, resume_from=None)
    actor = MegatronActor(policy, config)
    finished = []
    prompts = make_prompts()
    seeds = [derive_seed("test", prompt.sample_id) for prompt in prompts]
    rollouts = actor.generate(prompts, seeds, finished.append)
    assert rollouts.seconds.shape == (len(prompts),) and (rollouts.seconds > 0).all()
    again = actor.generate(prompts, seeds, finished.append, temperature=0.0)
    batch = make_batch(policy.model.tokenizer.vocab_size)
    actor.reference_logprobs(batch)
    rows = actor._share(batch)
    share = {
        "tokens": batch.tokens[rows],
        "mask": response_mask(batch)[rows],
        "advantages": batch.advantages[rows],
        # A reference that differs from the policy, so that the divergence has a gradient.
        "ref_logprobs": actor._reference * 1.05 - 0.1,
        "old_logprobs": actor._reference * 0.98,
    }
    metrics = {}
    policy.model.prepare_for_training()
    for size in sizes.split(","):
        policy.model.cfg.micro_batch_size = int(size)
        metrics[size] = actor.accumulate(dict(share), response_mask(batch))
        metrics[size]["grad_norm"] = actor.grad_norm()
        save_gradients(policy.model, out_dir / f"gradients_{size}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        metrics["non_finite"] = {"refused": refuses_non_finite(actor, policy.model, batch)}
    if actor.is_main:
        tensors = {"tokens": rollouts.tokens, "lengths": rollouts.lengths, "greedy": again.tokens.contiguous()}
        save_file(tensors, out_dir / "rollouts.safetensors")
        (out_dir / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
