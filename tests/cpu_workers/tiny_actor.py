"""A NeMo-Aligner Megatron actor small enough for a test, with everything around it that a training script sets up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SEQUENCE = 48
VOCABULARY = 288


def config(workdir: Path, devices: int, tensor: int, pipeline: int, experiment: Path) -> Any:
    """The configuration of a training script: trainer, exp_manager and model, as NeMo-Aligner's own examples have."""
    from omegaconf import OmegaConf

    trainer = dict(
        num_nodes=1,
        devices=devices,
        accelerator="cpu",
        precision=32,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=1,
        max_steps=10,
        val_check_interval=1,
        gradient_clip_val=1.0,
        reinforce={},
    )
    checkpoints = dict(
        monitor="val_rewards",
        mode="max",
        save_top_k=1,
        always_save_nemo=False,
        save_nemo_on_train_end=False,
        filename="actor-{step}-{consumed_samples}-{reinforce_optimization_step}-{epoch}-{val_rewards:.3f}",
        model_parallel_size=tensor * pipeline,
    )
    manager = dict(
        explicit_log_dir=str(experiment),
        exp_dir=None,
        name="actor",
        create_wandb_logger=False,
        create_tensorboard_logger=False,
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        create_checkpoint_callback=True,
        checkpoint_callback_params=checkpoints,
    )
    model = dict(
        mcore_gpt=True,
        micro_batch_size=2,
        global_batch_size=4,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=None,
        encoder_seq_length=128,
        max_position_embeddings=128,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        init_method_std=0.1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        ffn_dropout=0.0,
        normalization="rmsnorm",
        layernorm_epsilon=1e-5,
        make_vocab_size_divisible_by=VOCABULARY // 2,
        bias=False,
        activation="fast-swiglu",
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        transformer_engine=False,
        use_cpu_initialization=True,
        megatron_amp_O2=False,
        masked_softmax_fusion=False,
        # Compiled by torch on a GPU; the stand-in must keep them as plain functions.
        bias_activation_fusion=True,
        bias_dropout_add_fusion=True,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        sequence_parallel=False,
        activations_checkpoint_granularity=None,
        activations_checkpoint_method=None,
        activations_checkpoint_num_layers=None,
        activations_checkpoint_layers_per_pipeline=None,
        gradient_as_bucket_view=True,
        precision=32,
        seed=1234,
        name="",
        tokenizer=dict(library="huggingface", type=str(workdir / "tokenizer"), use_fast=True),
        data=dict(data_prefix=None, reset_position_ids=False, reset_attention_mask=False, dataloader_type="single"),
        peft=dict(peft_scheme="none", restore_from_path=None),
        optim=dict(name="mcore_distributed_optim", lr=1e-2, weight_decay=0.1, betas=[0.9, 0.98]),
        reinforce=dict(
            rollout_micro_batch_size=2,
            num_rollout_samples=4,
            forward_micro_batch_size=2,
            offload_adam_states=False,
            sampling_params=dict(
                use_greedy=False,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                add_BOS=False,
                all_probs=False,
                compute_logprob=False,
                end_strings=["</s>"],
            ),
            length_params=dict(max_length=16, min_length=1),
            trt_llm=dict(enable=False),
        ),
        overwrite_base_config={},
    )
    return OmegaConf.create(dict(trainer=trainer, exp_manager=manager, model=model))


def tokens(rows: int, seed: int) -> Any:
    """int64 [rows, SEQUENCE], the same on every rank."""
    import torch

    return torch.randint(3, 260, (rows, SEQUENCE), generator=torch.Generator().manual_seed(seed))


def generate(model: Any) -> Any:
    """int64 [2, S], sampled from two prompts of different length."""
    import torch

    lengths = torch.tensor([5, 9])
    text = torch.full((2, 9 + 16), model.tokenizer.eos_id)
    text[:, :9] = tokens(2, seed=3)[:, :9]
    model.prepare_for_inference()
    rollouts = model.infer({"text": text, "length": lengths})
    model.finish_inference()
    return rollouts["response_tokens"]


def train_step(model: Any, optimizer: Any, scheduler: Any, rank: int, ranks: int) -> tuple[float, float]:
    """One optimizer step on this data-parallel rank's share of four samples; returns loss and gradient norm."""
    import torch

    batch = dict(
        response_tokens=tokens(4, seed=4),
        mask=torch.ones(4, SEQUENCE - 1),
        rewards_with_kl=torch.tensor([[1.0], [0.0], [0.5], [0.25]]),
        baseline=torch.full((4, 1), 0.4),
        is_end=torch.ones(4),
    )
    share = {name: part.chunk(ranks)[rank] for name, part in batch.items()}
    model.prepare_for_training()
    optimizer.zero_grad()
    model.prepare_for_training_step()
    loss, _ = model.get_loss_and_metrics(share, forward_only=False)
    model.finish_training_step()
    _, norm, _ = optimizer.step()
    scheduler.step()
    return float(loss), float(norm)
