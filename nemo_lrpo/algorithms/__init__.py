"""The maths of the policy update: pure functions of tensors, no collectives."""
