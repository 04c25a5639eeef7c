#!/usr/bin/env bash
# Splits SmolLM2's file into parts of 48 MiB below .gpu/, to be carried to a GPU machine: benches/gpu/split.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
file=$(.venv/bin/python -c 'from sssd.hf.smollm2 import _gguf; print(_gguf())')
rm -rf .gpu && mkdir .gpu
split --bytes=48M --numeric-suffixes --suffix-length=2 "$file" .gpu/part-
ls .gpu/part-[0-9]* | wc -l > .gpu/part-count
ls -l .gpu
