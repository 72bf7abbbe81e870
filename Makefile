# make bench | bench-peers | roofline | test | test-gpu | gpu-kit | test-zoo | test-floor | test-triton-versions |
# test-address | lint | build | format: each makes .venv, installs what requirements-dev.txt pins and builds, if need be.
#
#   make bench ARGS="--threads 4"      make test ARGS="-k stage"      make build PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes of make test.
WORKERS ?= 2
BIN := $(abspath $(VENV))/bin
# pip and the build look for ninja on PATH.
export PATH := $(BIN):$(PATH)

CXX_FILES := $(shell find kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PY_FILES := resnet_fast kernels/triton_ops benchmarks tests setup.py

# Releases of Triton beside the pinned one. GPU images carry the first: make test runs some kernels with it.
TRITON_VERSIONS ?= 3.6.0 3.8.0
# What GPU kernels compute; not what a compiler makes of them, which is pinned.
TRITON_TESTS := tests/ptxsim/tests/test_triton.py tests/simulated/engine/test_tape.py \
  $(patsubst %,tests/simulated/operators/test_%_simulated.py,add_relu conv_bn_relu) \
  $(patsubst %,tests/simulated/triton_kernels/test_%_triton.py,zero_trips add_relu batch_norm conv_bn_relu training)
# Operators, models and simulated GPUs; not the programs, their benchmarks, and what depends on the pinned compiler.
FLOOR_TESTS := tests --ignore-glob='*/test_program*' --ignore-glob='*/test_*benchmarks*' --ignore-glob='*/test_*gate*' \
  $(patsubst %,--ignore=tests/project/test_%.py,packaging documents triton_versions)

# What the CPU kernels read and write.
ADDRESS_TESTS := $(patsubst %,tests/ops/test_%.py,add_relu augment conv_bn_relu conv_chain bf16 threads) \
  tests/training/test_training_ops.py tests/training/test_saved_tensors.py -k 'not cuda_kernel'

.PHONY: bench bench-peers roofline test test-gpu gpu-kit test-zoo test-floor test-triton-versions test-address \
  lint build format clean

bench: build
	$(BIN)/python -m benchmarks $(ARGS)

# The other engines come on top; nothing else needs them.
bench-peers: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .[peers]
	$(BIN)/python -m benchmarks --peers $(ARGS)

# Bytes, arithmetic and floor times of the networks on GPUs, computed: no GPU needed.
roofline: build
	$(BIN)/python -m benchmarks.gpu.roofline

test: build $(VENV)-triton/3.6.0/.installed
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal $(ARGS)

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

# The oldest torch that the extension is for, and its Triton: the same build serves it.
test-floor: build $(VENV)-floor/.installed
	PYTHONPATH=$(CURDIR) $(abspath $(VENV)-floor)/bin/python -m pytest $(FLOOR_TESTS) $(ARGS)

test-triton-versions: build $(TRITON_VERSIONS:%=$(VENV)-triton/%/.installed)
	for version in $(TRITON_VERSIONS); do \
	  PYTHONPATH=$(abspath $(VENV)-triton)/$$version $(BIN)/python -m pytest $(TRITON_TESTS) $(ARGS) || exit 1; \
	done

# The CPU part built with AddressSanitizer; the package beside that build is a copy. Leaks are Python's and torch's, which
# are not instrumented; libstdc++ is loaded early, as the sanitizer looks there for what throws. (ThreadSanitizer does not
# see where the threads of torch's libgomp meet, and reports races behind every parallel loop.)
test-address: $(VENV)/.installed
	USE_CUDA=0 CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS=-fsanitize=address \
	  $(BIN)/python setup.py --quiet build --build-base build/address --build-lib build/address/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/address/lib:. $(BIN)/pytest $(ADDRESS_TESTS) $(ARGS)

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

$(VENV)-floor/.installed: requirements-floor.txt requirements-nodeps.txt
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-floor.txt
	$(VENV)-floor/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	touch $@

# A folder for PYTHONPATH: everything else is that of $(VENV).
$(VENV)-triton/%/.installed: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-zoo $(VENV)-floor $(VENV)-triton build dist *.egg-info resnet_fast/*.so
