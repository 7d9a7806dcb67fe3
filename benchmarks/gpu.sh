#!/usr/bin/env bash
# The first minutes on a GPU: benchmarks/gpu.sh CIFAR10.tar.gz OUT [flags of benchmarks.pack]
# Unpacks the images (an archive of one folder with train/ and val/) into memory and runs
# benchmarks.pack on them. PYTHON=... chooses the interpreter.
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "benchmarks/gpu.sh: expected an archive of images and a folder for the results:" \
        "benchmarks/gpu.sh cifar10.tar.gz OUT [--minutes 9]" >&2
    exit 2
fi
began=$(date +%s.%N)
archive=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."
memory=/dev/shm
free_kib() { df -Pk "$1" | awk 'NR == 2 {print $4}'; }
[ -w "$memory" ] && [ "$(free_kib "$memory")" -gt 4000000 ] || memory=${TMPDIR:-/tmp}
images=$(mktemp -d "$memory/images-XXXXXX")
trap 'rm -rf "$images"' EXIT
tar -xzf "$archive" -C "$images"
train=$(find "$images" -maxdepth 2 -type d -name train | head -n 1)
if [ -z "$train" ]; then
    echo "benchmarks/gpu.sh: $archive has no folder train:" \
        "expected train/ and val/ with a folder a class" >&2
    exit 2
fi
"${PYTHON:-python3}" -m benchmarks.pack --began "$began" --data "$(dirname "$train")" \
    --out "$out" "$@"
