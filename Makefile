# Skate: `make` lists what there is.
#
# Everything is built into .venv, from a fresh clone, with git, make, Python 3.11+ and cargo.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := $(shell find crates -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
NEED_CARGO := command -v cargo >/dev/null || { echo 'Skate is built with cargo: install Rust 1.88 or newer \
(https://rustup.rs, or the packages of your system), and see that cargo is on your PATH.' >&2; exit 1; }
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-python chaos soak simulation bench lint format clean wheel

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */: /' | awk -F': ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.built $(VENV)/.demo  ## index the standard library's source on all cores
	@$(BIN)/python examples/index_source.py

test: test-rust test-python  ## the whole test suite

test-rust: $(VENV)/.built
	cargo test --workspace --exclude skate-py --quiet

test-python: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest tests

chaos: $(VENV)/.built $(VENV)/.dev  ## minutes of networks and nodes that fail (as root), and of random kills
	$(BIN)/python -m pytest tests -m chaos
	SKATE_CHAOS_S=$${SKATE_CHAOS_S:-120} $(BIN)/python -m pytest tests/chaos --timeout=1200

soak: $(VENV)/.dev  ## ten million tasks and 100,000 actors on three nodes: memory must not grow (half an hour)
	$(BIN)/maturin develop --release --quiet && touch $(VENV)/.built
	$(BIN)/python bench/soak.py

simulation: $(VENV)/.built $(VENV)/.dev  ## ten thousand nodes in virtual time: minutes, and 2 GB of memory
	$(BIN)/python -m tests.simulation.large --placements 170000

bench: $(VENV)/.dev bench/.venv-ray/.installed  ## compare with Ray, side by side (installs Ray under bench/)
	$(BIN)/maturin develop --release --quiet && touch $(VENV)/.built
	$(BIN)/python bench/compare.py --ours $(BIN)/python --theirs bench/.venv-ray/bin/python

lint: $(VENV)/.built $(VENV)/.dev  ## formatting, clippy, ruff, mypy, layer contracts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --log-level error check; \
	else echo 'cargo-deny is not installed: licences, advisories and duplicates of crates were not checked'; fi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format:  ## rewrite the sources as lint wants them
	cargo fmt --all
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

wheel: $(VENV)/.tools  ## build the release wheel into dist/
	$(BIN)/maturin build --release --out dist

clean:  ## remove everything that was built
	rm -rf $(VENV) target dist bench/.venv-ray

$(VENV)/.tools:
	@$(NEED_CARGO)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Skate needs Python 3.11 or newer: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'maturin>=1.9,<2'
	@touch $@

$(VENV)/.built: $(VENV)/.tools pyproject.toml $(RUST)
	@$(NEED_CARGO)
	@echo 'Compiling the Rust core; the first time takes a minute or two.'
	@$(BIN)/maturin develop --quiet >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(BIN)/python -m compileall -q python/ray
	@touch $@

$(VENV)/requirements-%.txt: $(VENV)/.tools pyproject.toml
	@$(BIN)/python -c 'import sys, tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]))' $* > $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/requirements-%.txt
	$(PIP) install -r $<
	@touch $@

bench/.venv-ray/.installed:
	bash bench/setup_ray.sh
	@touch $@
