"""The training loop: the step, checkpoints, evaluation, metrics. Never imports Megatron; the actor comes by protocol."""
