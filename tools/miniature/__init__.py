"""The published claim in the demo's world: what tools/reproduce.py runs, keeps and shows."""
