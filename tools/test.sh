#!/usr/bin/env bash
# Install if needed and run all tests; arguments go to pytest (for example: bash tools/test.sh -m "not slow").
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
.venv/bin/ruff check nemo_lrpo tools tests
.venv/bin/ruff format --check --quiet nemo_lrpo tools tests
exec .venv/bin/python -m pytest "$@"
