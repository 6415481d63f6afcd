"""The training loop: the step, checkpoints, evaluation, metrics. Never imports Megatron; actors come by protocol."""
