# make demo   set up and quantise, measure and run a real model
# make test   set up and run the tests
# make test-gpu-proof   the complete proof of the GPU kernels, which needs no GPU
# make test-gpu         the tests of the CUDA and the Triton kernels on a GPU
# make bench-gpu        measure them there; docs/gpu.md
# make bench  set up and measure the kernels against their rivals; docs/results.md
# make cuda   set up and compile the CUDA kernels, for all architectures or those of MEMLM_CUDA_ARCHS=80;90
PYTHON ?= python3
# The CPU build that the project is developed with; any torch from 2.10 on will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu test-gpu-proof bench bench-gpu build cuda clean
demo: $(VENV)/.ready
	$(BIN)/memlm demo

# A process for each CPU.  The threads of each wait without spinning, which would take the others' time.
test: $(VENV)/.ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile

test-gpu-proof: $(VENV)/.ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadgroup -m gpu_proof

# A few processes, each with some 500 MB of the GPU: Triton's kernels are compiled for each of its cases.
test-gpu: cuda
	MEMLM_TEST_GPU=1 $(BIN)/python -m pytest -n 4 -m '' tests/test_cuda_*.py tests/test_triton_*.py

bench-gpu: cuda
	$(BIN)/python -m benchmarks.bench_gpu --record

bench: $(VENV)/.rivals
	$(BIN)/python -m benchmarks.bench_w4_matmul --record
	$(BIN)/python -m benchmarks.bench_w8_matmul --record
	$(BIN)/python -m benchmarks.bench_w8a8_matmul --record
	$(BIN)/python -m benchmarks.bench_block_sparse_matmul --record
	$(BIN)/python -m benchmarks.bench_w4_sparse_matmul --record
	$(BIN)/python -m benchmarks.page

# Compiles llama.cpp, which takes some minutes.
$(VENV)/.rivals: $(VENV)/.ready
	MEMLM_CUDA_ARCHS=none $(BIN)/pip install --quiet $(TORCH) --editable '.[test,rivals]'
	touch $@

# Compiles again whatever has changed in csrc/.
build: $(VENV)/.ready

cuda: $(VENV)/.ready
	$(BIN)/python csrc/cuda/nvcc.py

# Without the CUDA kernels, which take minutes and which only a GPU runs: `make cuda` adds them.
SOURCES := $(shell find csrc -path csrc/cuda -prune -o '(' -name '*.cpp' -o -name '*.h' -o -name '*.ini' ')' -print)
$(VENV)/.ready: pyproject.toml setup.py $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet $(TORCH)
	MEMLM_CUDA_ARCHS=none $(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

clean:
	rm -rf build dist *.egg-info memlm/*.so $(VENV)
