#!/usr/bin/env bash
# Prepares .gpu/ to be carried to a GPU machine without network: benches/gpu/split.sh
# SmolLM2's file in parts of 44 MiB, beside which a wheel of transformers fits into one call, and the wheels of pure
# Python packages that the machine may lack.
set -euo pipefail
cd "$(dirname "$0")/../.."
file=$(.venv/bin/python -c 'from sssd.hf.smollm2 import _gguf; print(_gguf())')
rm -rf .gpu && mkdir .gpu
split --bytes=44M --numeric-suffixes --suffix-length=2 "$file" .gpu/part-
ls .gpu/part-[0-9]* | wc -l > .gpu/part-count
.venv/bin/pip download --quiet --no-deps --only-binary=:all: --dest .gpu/wheels gguf platformdirs
ls -lR .gpu
