"""The policy on its ranks: generation, log-probs, update, collectives, and the glue to NeMo."""
