#!/usr/bin/env bash
# Install if needed and run all tests, the files shared out over two processes; arguments go to pytest (for example:
# bash tools/test.sh -m "not slow", or -n 0 for one process).
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
.venv/bin/ruff check nemo_lrpo tools tests
.venv/bin/ruff format --check --quiet nemo_lrpo tools tests
# Two processes of one thread each are quicker than one of two.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
