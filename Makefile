# The front door for people. `make help` lists what there is.
PYTHON ?= python3
VENV   := .venv
# Tests mostly wait, for disks and for each other's processes.
JOBS   ?= 3
BIN    := $(VENV)/bin
# -qq and no warnings: an index that lacks something, an editable install. Errors are still said.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install -qq --no-build-isolation
NATIVE := $(wildcard native/*.pyx native/*.pxd native/*.c native/*.h) $(wildcard protos/warmsync/v1/*.proto)
C_FILES := $(filter %.c %.h,$(NATIVE)) $(wildcard benchmarks/*.c tests/agent/*.c tests/gauntlet/*.c tests/vm/*.c)
# cython-lint looks for pycodestyle on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help build setup demo test test-vm lint format bench gauntlet breaches sanitize clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: build ## one warm migration on this host, from a live writer to a byte compare
	@$(BIN)/python -m examples.demo.demo

test: setup ## the whole suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-vm: setup ## whole virtual machines under QEMU, moved while they write: docs/guests.md
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/vm -m ""

lint: setup ## ruff, mypy, cython-lint, clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy agent native tests benchmarks examples
	$(BIN)/cython-lint native
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: setup ## put the sources in the house style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

bench: setup ## all benchmarks: ratios, measured side by side in one run
	@mkdir -p build/bench
	$(BIN)/python -m benchmarks --json build/bench/results.json \
	  --markdown build/bench/results.md --picture build/bench/results.svg

gauntlet: setup ## whole migrations at which everything is thrown: make gauntlet SEED=1 N=20 LOG=F
	$(BIN)/python -m tests.gauntlet --seed $(or $(SEED),1) --count $(or $(N),20) --keep-going \
	  $(if $(LOG),--log $(LOG))

breaches: setup ## break each rule of the design on purpose until the gauntlet notices
	$(BIN)/python -m tests.gauntlet.breaches

sanitize: setup ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pytest tests/test_sanitizers.py

build: build/.installed ## install packages, make the virtual environment, build

setup: build/.installed-dev build/.guest-kernel

$(BIN)/python:
	@packaging/install-apt packaging/apt-build.txt
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --upgrade pip

build/.tools: $(BIN)/python pyproject.toml
	@packaging/install-apt packaging/apt-build.txt
	@$(BIN)/pip install -qq "setuptools>=77" "cython>=3.1" "grpcio-tools>=1.76" "googleapis-common-protos>=1.66"
	@mkdir -p build && touch $@

build/.installed: build/.tools setup.py $(NATIVE)
	@echo "building warmsync"
	@$(INSTALL) -e .
	@touch $@

build/.installed-dev: build/.installed packaging/apt-test.txt
	@packaging/install-apt packaging/apt-test.txt
	@$(INSTALL) --group dev
	@touch $@

# Where it cannot be had, setup goes on: the tests of guests are skipped, and say why.
build/.guest-kernel: packaging/unpack-kernel
	@mkdir -p build && if packaging/unpack-kernel build/guest-kernel; then touch $@; fi

clean: ## remove what was built
	rm -rf build $(VENV) *.egg-info native/*.so native/*.bpf.o protos/warmsync/v1/*_pb2*.py protos/warmsync/v1/*_pb2.pyi
