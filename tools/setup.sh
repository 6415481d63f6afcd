#!/usr/bin/env bash
# Create .venv at the root of the repository and install the pinned environment; quick when it is already there.
# PYTHON names the interpreter (default python3.11; 3.10 and 3.12 work where wheels exist).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
lock=tools/requirements-cpu.txt
stamp=.venv/.installed
want=$(sha256sum "$lock" | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}
command -v "$python" >/dev/null || fail "no $python on the PATH; install Python 3.11, or set PYTHON to one."
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler on the PATH; fastText builds from source."
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
  fail "$python is $("$python" --version); accepted: Python 3.10, 3.11, 3.12."

printf 'setup: installing the pinned environment into .venv (about 2.4 GB, some minutes)\n'
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade 'pip>=24' 'setuptools<81' wheel
# Every package is pinned and listed, so nothing is resolved and no CUDA package comes along.
"${pip[@]}" install --no-deps --progress-bar off -r "$lock" | grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' |
  awk '{ if ($1 == "Collecting") { if (++n % 20 == 0) print "setup: " n " packages fetched" } else print "setup: " substr($0, 1, 100) }'
.venv/bin/python - <<'PY' || fail "this torch cannot be imported; see above. On x86-64 the index may have given a CUDA build: point pip (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) at a CPU build of the version in tools/requirements-cpu.txt."
import torch
PY
printf '%s' "$want" >"$stamp"
