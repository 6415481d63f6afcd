"""One process of a parallel layout: rollouts, log-probs and gradients of the actor, for tests to compare.

    layout_worker NEMO OUT TP PP MICRO_BATCH_SIZES [model's KEY=VALUE ...]

Writes OUT/rollouts.safetensors and, for each micro batch size m, OUT/gradients_m.safetensors: the gradients, from a
distributed checkpoint, so that Megatron itself puts the shards of any layout together. Logits are made for CHUNK tokens
at a time; OUT/gradients_plain and `plain` in OUT/logprobs.safetensors come from those of a whole micro batch, two
sequences each, `packed` from sequences one after the other in the place of two.

With adapters a name is in the place of MICRO_BATCH_SIZES. TRAINED makes an update of them and writes OUT/metrics.json
and in OUT/TRAINED the shards of a checkpoint and the exported model. Other names go on from these shards, EVALUATED as
an evaluation does, with weights alone. All write OUT/NAME/results.safetensors, their log-probs and greedy answers, and
those that train OUT/NAME/gradients.safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from nemo_lrpo.actor.platform import ensure_platform

ensure_platform()

import torch  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
from logits_watch import Widest  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nemo_lrpo.actor import setup  # noqa: E402
from nemo_lrpo.actor.actor import MegatronActor, NonFiniteError, response_mask  # noqa: E402
from nemo_lrpo.actor.chunked_logprobs import Vocabulary, chunked_logprobs  # noqa: E402
from nemo_lrpo.actor.collectives import max_over_ranks  # noqa: E402
from nemo_lrpo.actor.setup import Policy, build_policy, check_nemo_sections  # noqa: E402
from nemo_lrpo.algorithms.preference import (  # noqa: E402
    PairLoss,
    dpo_loss,
    pair_weights,
    row_advantages,
    sequence_logprobs,
)
from nemo_lrpo.config.checks import ConfigError  # noqa: E402
from nemo_lrpo.config.loader import compose  # noqa: E402
from nemo_lrpo.config.schema import TrainConfig  # noqa: E402
from nemo_lrpo.config.training import ActorConfig, LoopConfig, PretrainedConfig, RolloutConfig  # noqa: E402
from nemo_lrpo.planning.parameters import ADAPTED, adapter_parameters  # noqa: E402
from nemo_lrpo.planning.shapes import from_nemo  # noqa: E402
from nemo_lrpo.seeding import derive_seed  # noqa: E402
from nemo_lrpo.types import Prompt, Rollouts, RoutedPrompt, TaggedPrompt, TrainingBatch  # noqa: E402

SEQUENCES = 8
WIDTH = 21
"""Tokens of the longest sequence and one of padding: a multiple of no number of ranks."""
CHUNK = 7
TRAINED, EVALUATED = "trained", "evaluated"
REFUSED = (
    "model.peft.lora_tuning.variant=canonical",
    "model.peft.lora_tuning.weight_tying=true",
    "rollout.backend=trt_llm",
)
"""Changes to a run with adapters, each of which ends in an error that names its key."""


def make_config(nemo: str, out: Path, tensor: int, pipeline: int, changes: list[str]) -> TrainConfig:
    tree = compose("train")
    model = OmegaConf.to_container(tree.model, resolve=False)
    model.update(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        precision=32,
        megatron_amp_O2=False,
        seed=1,
    )
    model = OmegaConf.to_container(OmegaConf.merge(model, OmegaConf.from_dotlist(changes)))
    trainer = OmegaConf.to_container(tree.trainer)
    trainer.pop("lrpo")
    trainer.update(devices=int(os.environ.get("WORLD_SIZE", "1")), accelerator="cpu", precision=32)
    return TrainConfig(
        run_dir=str(out / "run"),
        pretrained_checkpoint=PretrainedConfig(nemo),
        rollout=RolloutConfig(micro_batch_size=3, max_new_tokens=12, temperature=0.7),
        actor=ActorConfig(logits_chunk=CHUNK, offload_optimizer=True),
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
        tokens=torch.randint(3, vocabulary, (SEQUENCES, WIDTH), generator=generator),
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
    """Write the gradients in the layout of the parameters, to `directory`.safetensors."""
    whole_gradients(model)
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    gradients = {parameter.data_ptr(): parameter.main_grad for parameter in trained}
    sharded = {}
    for name, entry in model.sharded_state_dict().items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and entry.data.data_ptr() in gradients:
            entry.data = gradients[entry.data.data_ptr()].view(entry.data.shape)
            sharded[name] = entry
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded, str(directory))
    whole = dist_checkpointing.load_plain_tensors(str(directory))
    if torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, directory.with_suffix(".safetensors"))


def logits_watch(model: torch.nn.Module) -> Widest:
    """Of this rank's rows of the vocabulary, all of them and those that are tokens."""
    layer = getattr(model.get_model_module_list()[-1], "output_layer", None)
    rows = layer.output_size_per_partition if layer is not None else 0
    tokens = model.tokenizer.vocab_size - rows * parallel_state.get_tensor_model_parallel_rank()
    return Widest(model.cfg.hidden_size, rows, min(rows, tokens))


def pairs_gradient(actor: MegatronActor, model: torch.nn.Module, batch: TrainingBatch) -> float:
    """Of DPO over three pairs, by row advantages in micro batches that part the pairs: how far it lies from that of the
    loss itself in one micro batch, as a share of its norm."""
    plain_config, size = actor._config, model.cfg.micro_batch_size
    algorithm = dataclasses.replace(plain_config.algorithm, aggregation="sequence_mean", kl_coefficient=0.0)
    actor._config = dataclasses.replace(plain_config, algorithm=algorithm)
    chosen, rejected = torch.tensor([0, 3, 5]), torch.tensor([4, 1, 2])
    initial = torch.linspace(-40.0, -30.0, SEQUENCES)

    def loss(answers: torch.Tensor) -> PairLoss:
        weights = pair_weights(torch.ones(3, dtype=torch.bool), 3)
        return dpo_loss(answers[chosen], answers[rejected], initial[chosen], initial[rejected], weights)

    def of_pairs(logprobs: torch.Tensor, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss(sequence_logprobs(logprobs, part["mask"])).loss, {}

    def gradients() -> list[torch.Tensor]:
        return [parameter.main_grad.clone() for parameter in model.parameters()]

    mask = response_mask(batch)
    slopes = loss(actor.continuation_logprobs(batch.tokens, batch.prompt_lengths, batch.lengths)).slopes
    advantages = row_advantages(slopes, chosen, rejected, mask.sum(dim=1), normalised=False)
    model.prepare_for_training()
    model.cfg.micro_batch_size = 2
    actor.accumulate({"tokens": batch.tokens, "mask": mask, "advantages": advantages}, mask)
    by_rows = gradients()
    actor._configure_batches(1, SEQUENCES)
    actor._policy.optimizer.zero_grad()
    model.prepare_for_training_step()
    model.forward_backward(actor._split({"tokens": batch.tokens, "mask": mask}, SEQUENCES), of_pairs)
    model.finish_training_step()
    own = gradients()
    actor._config, model.cfg.micro_batch_size = plain_config, size
    distance = sum(float((a - b).double().square().sum()) for a, b in zip(by_rows, own, strict=True))
    return (distance / sum(float(value.double().square().sum()) for value in own)) ** 0.5


def tag_gradients(actor: MegatronActor, model: torch.nn.Module, batch: TrainingBatch) -> dict[str, float]:
    """A response whose first three tokens choose its language, and the same one with these prefilled: how far the
    update's gradients lie from those of A log pi(all | prompt) and of A log pi(rest | prompt, tag), and from each
    other, as shares of their norms. Without divergence, whatever algorithm.kl_coefficient."""
    row, start, tag, advantage = 2, 4, 3, 0.7
    end = int(batch.lengths[row])
    tokens, size = batch.tokens[row : row + 1], model.cfg.micro_batch_size
    model.cfg.micro_batch_size, actor._divergence = 1, False

    def by_update(prompt_length: int) -> list[torch.Tensor]:
        one = TrainingBatch(
            tokens=tokens,
            prompt_lengths=torch.tensor([prompt_length]),
            lengths=torch.tensor([end]),
            advantages=torch.tensor([advantage]),
            use=torch.tensor([True]),
        )
        mask = response_mask(one)
        actor.accumulate({"tokens": tokens, "mask": mask, "advantages": one.advantages}, mask)
        return [parameter.main_grad.clone() * int(mask.sum()) for parameter in model.parameters()]

    def by_definition(first: int) -> list[torch.Tensor]:
        def of_tokens(
            logprobs: torch.Tensor, part: dict[str, torch.Tensor]
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            # Log-prob t is that of token t + 1.
            return -advantage * logprobs[0, first - 1 : end - 1].sum(), {}

        actor._configure_batches(1, 1)
        actor._policy.optimizer.zero_grad()
        model.prepare_for_training_step()
        model.forward_backward(actor._split({"tokens": tokens}, 1), of_tokens)
        model.finish_training_step()
        return [parameter.main_grad.clone() for parameter in model.parameters()]

    def apart(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
        distance = sum(float((a - b).double().square().sum()) for a, b in zip(left, right, strict=True))
        return (distance / sum(float(value.double().square().sum()) for value in right)) ** 0.5

    chosen, forced = by_update(start), by_update(start + tag)
    facts = {
        "chosen": apart(chosen, by_definition(start)),
        "forced": apart(forced, by_definition(start + tag)),
        "each other": apart(forced, chosen),
    }
    model.cfg.micro_batch_size, actor._divergence = size, True
    return facts


def refuses_non_finite(actor: MegatronActor, model: torch.nn.Module, batch: TrainingBatch) -> bool:
    """Whether a batch with a NaN stops before any weight or optimizer state has moved."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch.advantages[2] = torch.nan
    try:
        actor.update(batch)
    except NonFiniteError:
        return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    return False


def moved_states(actor: MegatronActor, policy: Policy, batch: TrainingBatch, out: Path) -> dict[str, bool]:
    """After an update: the reference is the initial policy, and the optimizer's states are away where they may be."""
    initial = actor._logprobs(batch.tokens)
    actor.reference_logprobs(batch)
    actor.update(batch)
    moments = [
        state[name]
        for state in policy.optimizer.mcore_optimizer.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    values = [moment.clone() for moment in moments]
    weights = [parameter.detach().clone() for parameter in policy.model.parameters()]
    sizes: list[int] = []

    def look(rollouts: Rollouts) -> None:
        sizes.append(sum(moment.untyped_storage().nbytes() for moment in moments))

    actor.reference_logprobs(batch)
    facts = {
        "reference is the initial policy": torch.equal(actor._reference, initial),
        "policy is back": all(map(torch.equal, weights, policy.model.parameters())),
        "policy has moved": not torch.equal(actor._logprobs(batch.tokens), initial),
    }
    prompts = make_prompts()
    actor.generate(prompts, range(len(prompts)), look)
    facts["away during generation"] = len(sizes) > 1 and not any(sizes)
    (out / "shards").mkdir()
    actor.save_shards(out / "shards")
    facts["back when saved"] = all(map(torch.equal, moments, values)) and any(value.any() for value in values)
    saved = dist_checkpointing.load_plain_tensors(str(out / "shards"))
    names = [name for name in saved if "exp_avg" in name and "exp_avg_sq" not in name]
    total = sum(float(saved[name].double().square().sum()) for name in names)
    there = sum(float(value.double().square().sum()) for value in values[::2])
    facts["saved as they are"] = abs(total - there) <= 1e-9 * there
    return facts


def with_adapters(config: TrainConfig, name: str, out: Path) -> None:
    """LoRA in this layout, see above."""
    shards = out / TRAINED / "shards"
    resume_from = None if name == TRAINED else shards
    policy = build_policy(config, total_updates=1, resume_from=resume_from, training=name != EVALUATED)
    actor = MegatronActor(policy, config)
    batch = make_batch(policy.model.tokenizer.vocab_size)
    if name == TRAINED:
        facts = adapters(actor, policy, batch, shards.parent) | refusals(config, shards)
        if actor.is_main:
            (out / "metrics.json").write_text(json.dumps(facts))
    if name != EVALUATED:
        actor.reference_logprobs(batch)
        policy.model.prepare_for_training()
        actor.accumulate(adapters_share(actor, batch), response_mask(batch))
        save_gradients(policy.model, out / name / "gradients")
    prompts = make_prompts()
    found = {
        "tokens": batch.tokens,
        "logprobs": policy_logprobs(actor, batch).contiguous(),
        "answers": actor.generate(prompts, range(len(prompts)), lambda _: None, temperature=0.0).tokens.contiguous(),
    }
    if actor.is_main:
        (out / name).mkdir(exist_ok=True)
        save_file(found, out / name / "results.safetensors")


def policy_logprobs(actor: MegatronActor, batch: TrainingBatch) -> torch.Tensor:
    """As between two steps: passes without gradient go without sequence parallelism."""
    actor._model.prepare_for_inference()
    logprobs = actor._logprobs(batch.tokens)
    actor._model.finish_inference()
    return logprobs


def adapters_share(actor: MegatronActor, batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """What an update reads; the old policy is the reference."""
    share = {"tokens": batch.tokens, "mask": response_mask(batch), "advantages": batch.advantages}
    return share | {"ref_logprobs": actor._reference, "old_logprobs": actor._reference}


def adapters(actor: MegatronActor, policy: Policy, batch: TrainingBatch, out: Path) -> dict[str, bool]:
    """One update of LoRA's adapters, and another's gradients with chunks and whole logits."""
    model = policy.model
    base = {name: value.detach().clone() for name, value in named(model) if not value.requires_grad}
    initial = policy_logprobs(actor, batch)
    actor.reference_logprobs(batch)
    actor.update(batch)
    after = policy_logprobs(actor, batch)
    actor.reference_logprobs(batch)

    def refused(change: str) -> bool:
        tree = OmegaConf.merge({"model": actor._config.model}, OmegaConf.from_dotlist([change]))
        config = dataclasses.replace(actor._config, model=OmegaConf.to_container(tree.model))
        if "rollout" in tree:
            config.rollout = dataclasses.replace(config.rollout, **tree.rollout)
        return change.split("=")[0] in refusal(lambda: check_nemo_sections(config))

    tensor = parallel_state.get_tensor_model_parallel_world_size()
    planned = adapter_parameters(from_nemo(model.cfg, 1), tensor, ADAPTED, model.cfg.peft.lora_tuning.adapter_dim)
    saved = save_adapted(actor, out)
    restored = torch.equal(policy_logprobs(actor, batch), after)
    gradients = []
    model.prepare_for_training()
    for chunk in (0, CHUNK):
        model.logits_chunk = chunk
        actor.accumulate(adapters_share(actor, batch), response_mask(batch))
        gradients.append([value.main_grad.clone() for _, value in named(model) if value.requires_grad])
    return {
        "no copy of the model": model.reference is None,
        "reference is the initial policy": torch.equal(actor._reference, initial),
        "policy has moved": not torch.equal(after, initial),
        "base has not": all(torch.equal(value, base[name]) for name, value in named(model) if name in base),
        "gradients are those of whole logits": all(
            float((ours - plain).norm()) <= 1e-5 * float(plain.norm()) and bool(plain.any())
            for plain, ours in zip(*gradients, strict=True)
        ),
        "what cannot be merged or generated is refused": all(map(refused, REFUSED)),
        "the planner counts the adapters": sum(value.numel() for _, value in named(model) if value.requires_grad)
        == model.cfg.num_layers * planned,
        "a checkpoint has the adapters alone": saved < sum(value.nbytes for value in base.values()),
        "exporting leaves all as it was": restored,
    }


def refusals(config: TrainConfig, shards: Path) -> dict[str, bool]:
    """Configurations that the model's archive, or the checkpoint, rules out."""
    base = setup.load_checkpoint_model_config(config.pretrained_checkpoint.restore_from_path)
    gemma, tied = {**base, "name": "megatron_gemma2"}, {**base, "share_embeddings_and_output_weights": True}
    packing = dataclasses.replace(config, actor=ActorConfig(sequence_packing=True))
    tuned = dataclasses.replace(config, model={**config.model, "peft": {"peft_scheme": "ia3"}})
    staged = dataclasses.replace(config, model={**config.model, "pipeline_model_parallel_size": 2})

    def of_archive(archive: dict[str, object], changed: TrainConfig) -> str:
        with mock.patch.object(setup, "load_checkpoint_model_config", lambda path: archive):
            return refusal(lambda: check_nemo_sections(changed))

    said = {
        "actor.sequence_packing": of_archive(gemma, packing),
        "model.peft.peft_scheme='ia3'": of_archive(gemma, tuned),
        "model.pipeline_model_parallel_size=2": of_archive(tied, staged),
    }
    facts = {f"{key} is refused": key in text and "accepted: " in text for key, text in said.items()}
    without = refusal(lambda: setup._check_adapters(False, shards))
    facts["a checkpoint of adapters is refused without them"] = (
        "peft_scheme='none'" in without and str(shards.parent) in without
    )
    facts["nothing else is refused"] = not refusal(lambda: setup._check_adapters(True, shards)) and not of_archive(
        base, staged
    )
    return facts


def refusal(work: Callable[[], object]) -> str:
    """What a ConfigError says, or nothing."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    return ""


def ranks_without_tokens() -> bool:
    """Whether log-probs and gradients are right where all but the first tensor-parallel rank have padding only."""
    group, generator = parallel_state.get_tensor_model_parallel_group(), torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(9, 5, generator=generator).requires_grad_() for _ in range(2))
    targets, rank = torch.arange(9) % 6, parallel_state.get_tensor_model_parallel_rank()
    expected = torch.nn.functional.linear(hidden, weight[:6]).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    whole = torch.autograd.grad(expected.square().sum(), [hidden, weight])
    own = weight.detach().clone().requires_grad_()
    found = chunked_logprobs(hidden, own, None, targets, Vocabulary(6, first=9 * rank, group=group, chunk=CHUNK))
    of_hidden, of_weight = torch.autograd.grad(found.square().sum(), [hidden, own])
    torch.distributed.all_reduce(of_hidden, group=group)
    return (
        torch.allclose(found, expected, atol=1e-5)
        and torch.allclose(of_hidden, whole[0], atol=1e-5)
        and torch.allclose(of_weight, whole[1] if rank == 0 else torch.zeros_like(weight), atol=1e-5)
    )


def save_adapted(actor: MegatronActor, out: Path) -> int:
    """A checkpoint and an export; returns the bytes of the model in the checkpoint."""
    if actor.is_main:
        (out / "shards").mkdir(parents=True)
    actor.barrier()
    actor.save_shards(out / "shards")
    actor.export(out / "model.nemo", {})
    read = torch.distributed.checkpoint.FileSystemReader(out / "shards").read_metadata().state_dict_metadata
    return sum(
        entry.size.numel() * 4
        for name, entry in read.items()
        if name.startswith("model.") and isinstance(entry, torch.distributed.checkpoint.metadata.TensorStorageMetadata)
    )


def named(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [entry for chunk in model.get_model_module_list() for entry in chunk.named_parameters()]


def main() -> None:
    nemo, out, tensor, pipeline, sizes, *changes = sys.argv[1:]
    out_dir = Path(out)
    config = make_config(nemo, out_dir, int(tensor), int(pipeline), changes)
    check_nemo_sections(config)
    if config.model["peft"]["peft_scheme"] != "none":
        with_adapters(config, sizes, out_dir)
        return
    policy = build_policy(config, total_updates=1, resume_from=None)
    actor, model = MegatronActor(policy, config), policy.model
    batch = make_batch(model.tokenizer.vocab_size)
    finished = []
    prompts = make_prompts()
    seeds = [derive_seed("test", prompt.sample_id) for prompt in prompts]
    with logits_watch(model) as watch:
        rollouts = actor.generate(prompts, seeds, finished.append)
    metrics: dict[str, dict[str, float]] = {"logits of": {"generation": max_over_ranks(watch.tokens)}}
    assert ranks_without_tokens()
    assert rollouts.seconds.shape == (len(prompts),) and (rollouts.seconds > 0).all()
    again = actor.generate(prompts, seeds, finished.append, temperature=0.0)
    # An odd number of rows; one alone leaves a rank without any.
    few = (batch.tokens[:5], batch.prompt_lengths[:5], batch.lengths[:5])
    continuations = actor.continuation_logprobs(*few)
    assert torch.allclose(actor.continuation_logprobs(*(part[3:4] for part in few)), continuations[3:4])
    with logits_watch(model) as watch:
        actor.reference_logprobs(batch)
    metrics["logits of"]["reference"] = max_over_ranks(watch.tokens)
    rows = actor._share(batch)
    share = {
        "tokens": batch.tokens[rows],
        "mask": response_mask(batch)[rows],
        "advantages": batch.advantages[rows],
        # A reference that differs from the policy, so that the divergence has a gradient.
        "ref_logprobs": actor._reference * 1.05 - 0.1,
        "old_logprobs": actor._reference * 0.98,
    }
    reference, actor._reference = actor._reference, None
    model.logits_chunk = 0
    model.prepare_for_inference()
    plain = actor._logprobs(batch.tokens[rows])
    inside = torch.arange(WIDTH - 1) < batch.lengths[rows].unsqueeze(1) - 1
    packed = actor._logprobs(batch.tokens[rows], batch.lengths[rows]).where(inside, plain)
    model.finish_inference()
    model.prepare_for_training()
    for name in ("plain", "packed", *sizes.split(",")):
        model.cfg.micro_batch_size = int(name) if name.isdigit() else 2
        model.logits_chunk = 0 if name == "plain" else CHUNK
        part = {**share, "lengths": batch.lengths[rows]} if name == "packed" else dict(share)
        with logits_watch(model) as watch:
            metrics[name] = actor.accumulate(part, response_mask(batch))
        metrics["logits of"][name] = max_over_ranks(watch.tokens)
        metrics[name]["grad_norm"] = actor.grad_norm()
        save_gradients(model, out_dir / f"gradients_{name}")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        metrics["pairs"] = {"distance": pairs_gradient(actor, model, batch)}
        metrics["tag"] = tag_gradients(actor, model, batch)
        metrics["moved"] = moved_states(actor, policy, batch, out_dir)
        metrics["non_finite"] = {"refused": refuses_non_finite(actor, model, batch)}
    if actor.is_main:
        tensors = {"tokens": rollouts.tokens, "lengths": rollouts.lengths, "greedy": again.tokens.contiguous()}
        save_file(tensors, out_dir / "rollouts.safetensors")
        logprobs = {"rows": rows, "chunked": reference, "plain": plain, "packed": packed}
        save_file(logprobs, out_dir / "logprobs.safetensors")
        save_file({"rows": few[0].contiguous(), "logprobs": continuations}, out_dir / "continuations.safetensors")
        (out_dir / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
