#!/usr/bin/env bash
# Tests of kernels by another version of Triton than the one that is installed, which stays:
#   bash tests/kernels/with_triton.sh 3.6.0 [what pytest takes; default: all of tests/kernels]
# PYTEST names the pytest to run, and TRITON_FOLDER a folder to keep that version in.
set -euo pipefail

version="$1"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${TRITON_FOLDER:-$(mktemp -d)}"
[ -n "${TRITON_FOLDER:-}" ] || trap 'rm -rf "$folder"' EXIT
pytest="${PYTEST:-pytest}"
[ -d "$folder/triton" ] || "$(dirname "$(command -v "$pytest")")/python" -m pip install -q --no-deps --target "$folder" "triton==$version"
[ $# -gt 0 ] || set -- "$root/tests/kernels"
PYTHONPATH="$folder" "$pytest" -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$@"
