# `make install` once; then `make demo`, `make test`, `make check`.
PYTHON ?= python3
UV_VERSION := 0.9.30
BIN := .venv/bin
# The system's certificates, as pip takes them: uv alone knows only the public ones.
export UV_NATIVE_TLS ?= $(if $(wildcard /etc/ssl/certs/ca-certificates.crt),true,false)

.PHONY: install demo test test-cluster test-chaos test-large check lock clean

# For a GPU TensorFlow needs CUDA's libraries: `make install DEVICE=gpu`, or cpu, states it; else it
# is what is installed, or what there is.
INSTALLED := $(patsubst .venv/installed-%,%,$(wildcard .venv/installed-*))
DEVICE ?= $(or $(INSTALLED),$(if $(and $(shell command -v nvidia-smi),$(filter x86_64,$(shell uname -m))),gpu,cpu))
LOCKS := requirements.lock $(if $(filter gpu,$(DEVICE)),cluster/gpu.lock)

# Compiled at install: without bytecode every start of TensorFlow and Ray is ten seconds slower.
install: .venv/installed-$(DEVICE)

.venv/installed-$(DEVICE): $(LOCKS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode $(LOCKS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	rm -f .venv/installed-*
	touch $@

demo: install
	$(BIN)/python -m jobs.demo --output demo

# Two files at a time, each with a Ray of its own: most tests wait for processes to start. The order
# is conftest's.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Hosts as network namespaces, faults while a run works; root, half an hour.
test-cluster: install
	DENOISE_TEST_CLUSTER=1 $(BIN)/python -m pytest -s tests/test_hosts.py

# The same with random faults: `make test-chaos SEED=2 MINUTES=10`.
SEED ?= 1
MINUTES ?= 5
test-chaos: install
	$(BIN)/python tests/chaos.py --seed $(SEED) --minutes $(MINUTES)

# A gigapixel image by one actor and by three; twenty minutes.
test-large: install
	DENOISE_TEST_LARGE=1 $(BIN)/python -m pytest -s tests/test_large.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Newest versions within pyproject.toml's bounds, with hashes, for Linux and Python 3.11; and what the
# image for GPUs has on top: CUDA's wheels.
lock:
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --extra benchmark --extra export --generate-hashes \
	    --no-emit-index-url --no-header --python-version 3.11 --universal -o requirements.lock
	$(BIN)/uv pip compile -q pyproject.toml --extra gpu --constraint requirements.lock --generate-hashes \
	    --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 | awk '/^[a-z]/{keep=/^nvidia-/} keep' > cluster/gpu.lock

clean:
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
