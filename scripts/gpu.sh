#!/usr/bin/env bash
# What needs a GPU, in three calls of at most nine minutes each:
#
#   scripts/gpu.sh tests OUT          training, compiled steps and precision on the GPU: tests/test_cuda.py
#   scripts/gpu.sh benchmark OUT      speed and memory beside other implementations
#   scripts/gpu.sh queue OUT QUEUE    experiments, as scripts/run_queue.py; those that are not done go on in the next call
#
# Results are written into the folder OUT, which a later machine needs again for the queue. It uses the python of the
# PATH, in which `pip install '.[test,bench]'` has run.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-} out=${2:-}
if [ -z "$out" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$out"
case $part in
tests) timeout 540 python -m pytest -n 0 -m '' tests/test_cuda.py 2>&1 | tee "$out/tests.txt" ;;
benchmark) timeout 540 python scripts/benchmark.py --device cuda --out "$out/benchmark" ;;
queue)
    python scripts/run_queue.py "${3:?a file with experiments is missing}" --hours 0.14 --at-once 4 \
        --unfinished "$out/unfinished" --reference "$out/reference"
    ;;
*)
    echo "gpu.sh: $part: must be tests, benchmark or queue" >&2
    exit 2
    ;;
esac
