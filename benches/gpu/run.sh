#!/usr/bin/env bash
# Measures and checks the CUDA path on one GPU in ten minutes: benches/gpu/run.sh [OUT]
#
# The machine needs Python >= 3.11 with torch (CUDA), transformers and numpy, and python/sssd/_core.abi3.so as `make
# install` builds it: for any such Python, glibc >= 2.34, the same processor architecture. Nothing is downloaded:
# split.sh puts what may be missing there (wheels; SmolLM2 in parts, as at most 64 MiB travel at a time) into .gpu/.
#
# Parts found in .gpu/ are kept in /tmp/sssd-gpu. `run.sh keep` does no more than that; once all are there SmolLM2 takes
# part, and with parts missing everything else runs. So, on a machine that forgets what it is not busy with, one after
# the other:
#   carry .gpu/part-00 .gpu/part-count:   bash benches/gpu/run.sh keep
#   carry python/sssd/_core.abi3.so .gpu/part-01 .gpu/wheels:   bash benches/gpu/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
kept=/tmp/sssd-gpu
mkdir -p "$kept"
cp .gpu/part-* "$kept"/ 2>/dev/null || true
if [ "${1:-}" = keep ]; then
    ls -l "$kept"
    exit
fi
out=${1:-${OUT:-benches/results/gpu}}
mkdir -p "$out"
if compgen -G ".gpu/wheels/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$kept/site" --upgrade .gpu/wheels/*.whl
    export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$kept/site"
fi
model=()
if [ -f "$kept/part-count" ] && [ "$(ls "$kept"/part-[0-9]* 2>/dev/null | wc -l)" = "$(cat "$kept/part-count")" ]; then
    cat "$kept"/part-[0-9]* > "$kept/smollm2.gguf"
    model=(--smollm2 "$kept/smollm2.gguf")
fi
export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 SSSD_CACHE="$kept/cache" HF_HUB_OFFLINE=1
python3 benches/gpu/measure.py --out "$out" "${model[@]}" "${@:2}" 2>&1 | tee "$out/gpu.log"
