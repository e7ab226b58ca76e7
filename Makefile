# The commands of the project. `make` lists them.
#
#   make demo             everything from a fresh machine to the shipped model writing text
#   make test             everything from a fresh machine to all tests, C++ and Python
#
# Settings: TORCH=... requirement for torch · CUDA=pip nvcc from pip, CUDA=off no kernels · NO_CPP=1 do without C++ tests
#           VENV=... environment · PYTHON=... the Python it is made from · MAX_JOBS=... parallel compilers
PYTHON ?= python3
export VENV ?= .venv
BIN := $(VENV)/bin
PREPARE := $(PYTHON) .ci/prepare.py
CPP_TESTS := $(PYTHON) .ci/cpp_tests.py
NEEDS_GPU = nvidia-smi -L 2>/dev/null | grep -q '^GPU' || { echo "a Hopper GPU must be there, nvidia-smi lists none"; exit 1; }
# PYTEST_ARGS, GTEST_ARGS, DEMO_ARGS and CMAKE_ARGS (test-cpp) are handed on.
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help build demo test test-cpp test-emulated lint format sanitize bench ncu clean

help:  ## list the commands
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

build:  ## build and install into .venv, in place
	@$(PREPARE) build

demo:  ## build, then run the shipped model: exact and MAGE side by side
	@$(PREPARE) demo
	@$(BIN)/mage demo $(DEMO_ARGS)

test:  ## build, then run all tests
	@$(PREPARE) test
	@status=0; \
	cpp=$$(ls build/cpython-*/tests/cpp/mage_cpp_tests 2>/dev/null | head -n 1); \
	if [ -n "$$cpp" ]; then $(CPP_TESTS) $$cpp $(GTEST_ARGS) || status=1; fi; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) || status=1; \
	if [ -z "$$cpp" ]; then echo "C++ tests NOT RUN (GoogleTest is missing)"; [ "$(NO_CPP)" = 1 ] || status=1; fi; \
	exit $$status

test-cpp:  ## build and run the C++ tests alone, torch absent
	@$(PREPARE) test-cpp
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cpp -G Ninja -DMAGE_TORCH=OFF -DMAGE_TESTS=ON $(CMAKE_ARGS)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp
	@$(CPP_TESTS) build/cpp/tests/cpp/mage_cpp_tests $(GTEST_ARGS)

# The kernels on the CPU (tests/emulator/README.md): the tests that subset.txt names, with two seeds.
SEEDS ?= 1 2
EMULATED ?= $(shell grep '^[*A-Z]' tests/emulator/subset.txt | paste -sd:)
EMULATED_JOBS ?= $(shell nproc)
test-emulated:  ## GPU tests of C++ on the CPU: SEEDS="1 2 3" EMULATED='*Votes*' (a filter); needs CUDA's headers
	@$(PREPARE) test-cpp
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/emulated -G Ninja -DMAGE_TORCH=OFF -DMAGE_TESTS=ON -DMAGE_EMULATOR=ON $(CMAKE_ARGS)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/emulated --target mage_emulated_tests
	@status=0; join=; for seed in $(SEEDS); do \
	  OMP_NUM_THREADS=1 $(CPP_TESTS) build/emulated/tests/emulator/mage_emulated_tests --jobs $(EMULATED_JOBS) --seed=$$seed $$join \
	    --gtest_filter='$(EMULATED)' $(GTEST_ARGS) || status=1; \
	  join=--join; \
	done; exit $$status

lint:  ## check format and style of everything tracked
	@$(PREPARE) lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format:  ## rewrite files in the house style
	@$(PREPARE) lint
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format . && $(BIN)/clang-format -i $(CXX_FILES)

# Of the GPU's tests, those that repeat the same launches a hundred times, in thousands of random cases or beside a kernel
# that reads late are left out.
TOOLS ?= memcheck racecheck synccheck initcheck
SANITIZE ?= *Cuda*-*AreBitwiseEqual*:*Random*:*SameBits*:*LeaveTheWorkspaceAlone*:*WaitsForReaders*
sanitize:  ## the C++ tests under compute-sanitizer: TOOLS="memcheck racecheck" SECONDS=...; needs a Hopper GPU
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer must be on PATH (CUDA toolkit)"; exit 1; }
	@$(NEEDS_GPU)
	@$(PREPARE) test
	@cpp=$$(ls build/cpython-*/tests/cpp/mage_cpp_tests | head -n 1); status=0; \
	for tool in $(TOOLS); do \
	  MAGE_REQUIRE_GPU=1 $(CPP_TESTS) $$cpp --tool $$tool $(if $(SECONDS),--seconds $(SECONDS)) \
	    --gtest_filter='$(SANITIZE)' $(GTEST_ARGS) || status=1; \
	done; exit $$status

# FA3=... the library _vllm_fa3_C.abi3.so of a vllm wheel; FlashInfer is timed where the environment has it.
BENCHES ?= block_attention sparse_attention token_mass row_votes select_kv merge_attention token_confidence block_total
bench:  ## time the operators beside their peers and write bench/results/h100: FA3=_vllm_fa3_C.abi3.so; needs an H100
	@test -f "$(FA3)" || { echo "FA3 must name _vllm_fa3_C.abi3.so of a vllm wheel, got '$(FA3)'"; exit 1; }
	@$(NEEDS_GPU)
	@$(PREPARE) build
	@status=0; for name in $(BENCHES); do \
	  out=bench/results/h100/$$name.json; options=; \
	  case $$name in \
	    block_attention) options="--device cuda --fa3 $(FA3)";; \
	    sparse_attention) options="--flashinfer --fa3 $(FA3)"; out=bench/results/h100/sparse_block_attention.json;; \
	    block_total) options="--fa3 $(FA3)";; \
	    token_confidence) options="--device cuda";; \
	  esac; \
	  $(BIN)/python bench/bench_$$name.py $$options --out $$out || status=1; \
	done; exit $$status

# One call of an op on a SHAPE of MODEL:BATCH:CONTEXT[:Q], with a flushed L2; the report is for ncu-ui.
OP ?= block_attention
SHAPE ?= 7B:1:32768
PAGE ?= 64
G ?= 64
K ?= 1024
ncu: export PATH := $(abspath $(BIN)):$(PATH):/usr/local/cuda/bin
ncu:  ## profile one call: OP=block_attention SHAPE=7B:1:32768 G=64 K=1024; needs Nsight Compute and a Hopper GPU
	@command -v ncu >/dev/null || { echo "ncu must be on PATH (Nsight Compute)"; exit 1; }
	@$(NEEDS_GPU)
	@{ command -v cmake && command -v ninja; } >/dev/null || $(PREPARE) test-cpp
	@cmake -S . -B build/bench -G Ninja -DMAGE_TORCH=OFF -DMAGE_TESTS=OFF -DMAGE_CUDA=ON -DMAGE_BENCH=ON >/dev/null
	@cmake --build build/bench --target attention_driver
	@mkdir -p build/ncu && rm -f build/ncu/$(OP).ncu-rep
	@ncu --set full --import-source yes --profile-from-start off --kernel-name regex:mage_ -f -o build/ncu/$(OP) \
	  build/bench/bench/cpp/attention_driver $(OP) $(SHAPE) $(PAGE) $(G) 1 $(K)
	@test -f build/ncu/$(OP).ncu-rep || { echo "ncu wrote no report"; exit 1; }
	@ncu --import build/ncu/$(OP).ncu-rep --page details | \
	  awk '/Context [0-9]+, Stream/ { print } /Section:/ { on = /Speed Of Light Throughput/ } on && !/Context/'
	@echo "report: build/ncu/$(OP).ncu-rep"

clean:  ## remove everything that was built, the environment too
	rm -rf build dist .venv .pytest_cache .hypothesis .ruff_cache python/*.egg-info
	rm -f python/mage_ext/*.so python/mage_ext/_build_info.py
