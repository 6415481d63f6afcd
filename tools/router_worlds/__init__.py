"""Made-up worlds for tools/router_sim.py: what is true of languages, which questions come, and a run of a router."""
