"""Language-Routed Policy Optimization: GRPO in which the language of each rollout is a learned choice."""

__version__ = "0.1.0"
