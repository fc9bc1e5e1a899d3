#!/usr/bin/env bash
# Everything worth measuring on a machine with one GPU, in ten minutes, the most valuable first:
#   bash tests/benchmarks/gpu.sh [--output FOLDER] [--wheels FOLDER] [--minutes N] [--dry-run]
# Each step is a process with a time budget of its own; its record and its log lie in FOLDER as soon as it has any, and
# steps.jsonl has a line for each: a cut loses what was running, and a failure is noted while the rest goes on. The exit
# status is 0 only if every step passed. No network is needed: packages that are missing are installed from --wheels.
#   --dry-run   rehearse every step with small shapes on the CPU, even beside a GPU; times mean nothing
#   PYTHON      the Python to use (default: python3)
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
here="$root/tests/benchmarks"
python="${PYTHON:-python3}"
output="" wheels="" minutes=10 dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --output) output="${2:?--output needs a folder}" && shift 2 ;;
    --wheels) wheels="${2:?--wheels needs a folder}" && shift 2 ;;
    --minutes) minutes="${2:?--minutes needs a number}" && shift 2 ;;
    --dry-run) dry=1 && shift ;;
    *) echo "unknown option $1; there are --output, --wheels, --minutes and --dry-run" >&2 && exit 2 ;;
  esac
done
output="${output:-$here/results/gpu}"
mkdir -p "$output" || exit 2
output="$(cd "$output" && pwd)"
: >"$output/steps.jsonl"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
deadline=$((SECONDS + minutes * 60))
failures=0
if [ -n "$dry" ]; then
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi

note() { # name, state, exit status, seconds
  printf '{"step": "%s", "state": "%s", "status": %s, "seconds": %s}\n' "$1" "$2" "$3" "$4" >>"$output/steps.jsonl"
  printf '%-12s %-8s %4ss\n' "$1" "$2" "$4"
  [ "$2" = passed ] || failures=$((failures + 1))
}

step() { # name, budget in seconds, command...
  local name="$1" budget="$2" left=$((deadline - SECONDS)) begin=$SECONDS status
  shift 2
  [ "$budget" -le "$left" ] || budget="$left"
  if [ "$budget" -lt 5 ]; then
    note "$name" skipped 124 0
    return
  fi
  timeout --kill-after=5 "$budget" "$@" >"$output/$name.log" 2>&1 </dev/null
  status=$?
  case "$status" in
    0) note "$name" passed 0 $((SECONDS - begin)) ;;
    124 | 137) note "$name" cut "$status" $((SECONDS - begin)) ;;
    *) note "$name" failed "$status" $((SECONDS - begin)) && tail -n 3 "$output/$name.log" | sed 's/^/    /' ;;
  esac
}

missing="$("$python" - "$root/pyproject.toml" <<'PYTHON'
import importlib.util, re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
names = (re.match(r"\w+", one)[0] for one in needed if ";" not in one)  # modules of the same names; triton comes with torch
print(*(name for name in names if importlib.util.find_spec(name) is None))
PYTHON
)" || { echo "$python does not run; name another one, from 3.11 on: PYTHON=/path/to/python3 bash $0" >&2 && exit 2; }
if [ -n "$missing" ] && [ -z "$wheels" ]; then
  echo "missing: $missing. Give their wheels: --wheels FOLDER (pip download -d FOLDER lightning-lm)" >&2
  exit 2
elif [ -n "$missing" ]; then
  # shellcheck disable=SC2086
  step install 90 "$python" -m pip install --no-index --find-links "$wheels" $missing
fi

check() { step "$1" "$2" "$python" "$here/bench_gpu_checks.py" "$1" --output "$output/$1.json"; } # name, budget
if [ -n "$dry" ]; then
  step correct 300 "$python" "$here/bench_kernels.py" --correct --only "rms_norm*" "linear_cross*" "grouped_linear*" "ssd*" "gated_delta*" --output "$output/correct.json"
  step training 300 "$python" "$here/bench_training_kernels.py" --models 124M --rounds 1 --steps 1 --output "$output/training.json"
  step tune 300 "$python" -m lightning_lm.cli kernels tune rms_norm:64 --interpret --output "$output/tables.json"
  # One process for all checks: to import torch takes longer than they do.
  step checks 400 "$python" "$here/bench_gpu_checks.py" swap fp16 generate grpo nccl --small --output "$output/checks.json"
else
  step report 60 "$python" -m lightning_lm.cli kernels report
  step correct 90 "$python" "$here/bench_kernels.py" --correct --output "$output/correct.json"
  check swap 60
  step kernels 150 "$python" "$here/bench_kernels.py" --rounds 2 --output "$output/kernels.json"
  step training 150 "$python" "$here/bench_training_kernels.py" --rounds 2 --steps 5 --output "$output/training.json"
  step tune 60 "$python" -m lightning_lm.cli kernels tune --output "$output/tables.json"
  check fp16 40
  check generate 40
  check grpo 40
  check nccl 60
fi
echo "$((failures)) of the steps did not pass; records and logs: $output"
[ "$failures" -eq 0 ]
