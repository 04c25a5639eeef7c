#!/usr/bin/env bash
# Measures and checks the CUDA path on one GPU in ten minutes: benches/gpu/run.sh [OUT]
#
# The machine needs Python with torch, transformers, numpy and platformdirs, and python/sssd/_core.abi3.so as `make
# install` builds it (it serves every Python from 3.11 on). Nothing is downloaded.
#
# SmolLM2 (98 MB) may come in parts, as split.sh makes them: those found in .gpu/ are kept in /tmp/sssd-gpu, and once
# all are there it takes part. With parts missing everything else runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-${OUT:-benches/results/gpu}}
kept=/tmp/sssd-gpu
mkdir -p "$out" "$kept"
cp .gpu/part-* "$kept"/ 2>/dev/null || true
model=()
if [ -f "$kept/part-count" ] && [ "$(ls "$kept"/part-[0-9]* 2>/dev/null | wc -l)" = "$(cat "$kept/part-count")" ]; then
    cat "$kept"/part-[0-9]* > "$kept/smollm2.gguf"
    model=(--smollm2 "$kept/smollm2.gguf")
fi
export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 SSSD_CACHE="$kept/cache"
python3 benches/gpu/measure.py --out "$out" "${model[@]}" "${@:2}" 2>&1 | tee "$out/gpu.log"
