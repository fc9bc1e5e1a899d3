#!/usr/bin/env bash
# The tests with the lowest version that pyproject.toml admits of every package it names (what those need is the newest):
#   bash tests/with_lowest_versions.sh [what pytest takes; default: all tests]
# TORCH names another version of torch, such as a build for CPUs: TORCH=2.13.0+cpu. VENV is a folder to keep.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
venv="${VENV:-$work/venv}"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

python3 -m venv "$work/uv"
"$work/uv/bin/pip" install -qq "uv>=0.9,<0.14"  # pip has no way to ask for the lowest versions
[ -x "$venv/bin/python" ] || "$work/uv/bin/uv" venv -q --seed --python "$(command -v python3.11 || command -v python3)" "$venv"
if [ -n "${TORCH:-}" ]; then echo "torch==$TORCH" >"$work/override.txt"; else : >"$work/override.txt"; fi
cp -r "$root" "$work/source"  # a build leaves files behind
"$work/uv/bin/uv" pip install -q --python "$venv/bin/python" --resolution lowest-direct \
  --override "$work/override.txt" "$work/source[dev]"
[ $# -gt 0 ] || set -- -n 2 "$root/tests"
cd "$work"
"$venv/bin/python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$@"
