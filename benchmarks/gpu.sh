#!/usr/bin/env bash
# Builds sdcore with the Python, torch and nvcc of this machine and tests it on the machine's GPU.
# Needs no network: torch, pytest, setuptools, pybind11, ninja and Pillow must be installed, and for
# methods what the extra "diffusers" brings. Nothing is installed outside build/gpu.
#
#   bash benchmarks/gpu.sh [tests] [sanitize] [bench]     (default: all three)
#
#   PYTHON  default python3
#   OUT     where the logs go, default build/gpu-logs
set -uo pipefail
wanted=" ${*:-tests sanitize bench} "

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
copy=$root/build/gpu
logs=${OUT:-$root/build/gpu-logs}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)

# The installed copy comes before the source tree, in which tests and benchmarks are found.
export PYTHONPATH=$copy:$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
# compute-sanitizer can then name source lines. It costs nothing at run time.
export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -lineinfo"

table=()
failures=0

# step NAME COMMAND...: runs it in the current folder, into $logs/NAME.log and onto the screen.
step() {
  local name=$1 start=$SECONDS result=ok
  shift
  echo "=== $name: $*"
  "$@" 2>&1 | tee "$logs/$name.log"
  local status=${PIPESTATUS[0]}
  if ((status != 0)); then
    result="failed ($status)"
    failures=$((failures + 1))
  fi
  table+=("$(printf '%-32s %-14s %5d' "$name" "$result" $((SECONDS - start)))")
  return "$status"
}

skip() {
  echo "=== $1: skipped, $2"
  table+=("$(printf '%-32s %-14s %5d   %s' "$1" skipped 0 "$2")")
}

report() {
  {
    printf '\n%-32s %-14s %5s\n' step result sec.
    printf '%s\n' "${table[@]}"
  } | tee "$logs/summary.txt"
  echo "logs: $logs"
  exit $((failures > 0))
}

build() {
  rm -rf "$copy"
  SDCORE_BUILD_CUDA=1 "$python" -m pip install --verbose --no-build-isolation --no-deps \
    --no-index --upgrade --target "$copy" . || return
  cd "$copy" && "$python" - "$copy" <<'PYTHON'
import json, pathlib, sys
import torch, sdcore
from sdcore import _cuda
folder = pathlib.Path(sdcore.__file__).parent
assert folder.parent == pathlib.Path(sys.argv[1]), f"imported {folder}"
print("torch", torch.__version__, "on Python", sys.version.split()[0])
report = json.loads((folder / "_build.json").read_text())
print(json.dumps(report, indent=2))
assert report["cpu"]["built"], "the C++ module was not built, for the reason above"
assert _cuda.devices() and torch.cuda.is_available(), "no GPU is found here"
print(*_cuda.devices(), sep="\n")
PYTHON
}

tests() { "$python" -m pytest -p no:cacheprovider "$root/tests" "$@"; }

# The caching allocator would hide an access beyond the end of a tensor from the sanitizer.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -p no:cacheprovider "$root/tests" -m sanitize
}

step build build || report
cd "$copy"
if [[ $wanted == *" tests "* ]]; then
  step tests tests -m gpu
fi
if [[ $wanted == *" sanitize "* ]]; then
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      step "$tool" sanitize "$tool"
    else
      skip "$tool" "compute-sanitizer is not installed"
    fi
  done
fi
if [[ $wanted == *" bench "* ]]; then
  step bench "$python" -m benchmarks --device cuda --out "$logs"
fi
report
