# make bench | bench-peers | roofline | test | test-gpu | gpu-kit | test-zoo | lint | build | format: each makes .venv, installs what requirements-dev.txt pins and builds, if need be.
#
#   make bench ARGS="--threads 4"      make test ARGS="-k stage"      make build PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(abspath $(VENV))/bin
# pip and the build look for ninja on PATH.
export PATH := $(BIN):$(PATH)

CXX_FILES := $(shell find kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PY_FILES := resnet_fast kernels/triton_ops benchmarks tests setup.py

.PHONY: bench bench-peers roofline test test-gpu gpu-kit test-zoo lint build format clean

bench: build
	$(BIN)/python -m benchmarks $(ARGS)

# The other engines come on top; nothing else needs them.
bench-peers: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .[peers]
	$(BIN)/python -m benchmarks --peers $(ARGS)

# Bytes, arithmetic and floor times of the networks on GPUs, computed: no GPU needed.
roofline: build
	$(BIN)/python -m benchmarks.roofline

test: build
	$(BIN)/python -m pytest tests $(ARGS)

# On a machine with an NVIDIA GPU; without one they fail.
test-gpu: build
	$(BIN)/python -m pytest tests/gpu/gpu_*.py $(ARGS)

# A folder for machines with a GPU, PyTorch and Triton, and nothing else: tests, compute-sanitizer, tables of times.
gpu-kit: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),8.0;9.0a;10.0)
gpu-kit: $(VENV)/.installed
	USE_CUDA=1 $(BIN)/python setup.py build_ext --build-lib build/gpu-kit-lib --build-temp build/gpu-kit-tmp
	$(BIN)/python -m benchmarks.kit.pack build/gpu-kit-lib/resnet_fast/_C.abi3.so build/gpu-kit

# Networks of torchvision and timm, which want a later torch than the extension is built for: the same build serves it.
test-zoo: build $(VENV)-zoo/.installed
	PYTHONPATH=$(CURDIR) $(abspath $(VENV)-zoo)/bin/python -m pytest tests/zoo $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix-only $(PY_FILES)
	$(BIN)/ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.built

# Stamps: nothing is installed or built again until the files on the right change.
# What lies in requirements-nodeps.txt is read or compared with; what it asks for is not needed.
$(VENV)/.installed: requirements-dev.txt requirements-nodeps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(CXX_FILES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

$(VENV)-zoo/.installed: requirements-zoo.txt
	$(PYTHON) -m venv $(VENV)-zoo
	$(VENV)-zoo/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-zoo.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-zoo build dist *.egg-info resnet_fast/*.so
