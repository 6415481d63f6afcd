"""Configuration: schema, loader and checks. Imports neither torch nor NeMo."""
