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
# PYTEST_ARGS, GTEST_ARGS, DEMO_ARGS and CMAKE_ARGS (test-cpp) are handed on.
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help build demo test test-cpp lint format sanitize clean

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
	if [ -n "$$cpp" ]; then $$cpp $(GTEST_ARGS) || status=1; fi; \
	$(BIN)/python -m pytest $(PYTEST_ARGS) || status=1; \
	if [ -z "$$cpp" ]; then echo "C++ tests NOT RUN (GoogleTest is missing)"; [ "$(NO_CPP)" = 1 ] || status=1; fi; \
	exit $$status

test-cpp:  ## build and run the C++ tests alone, torch absent
	@$(PREPARE) test-cpp
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cpp -G Ninja -DMAGE_TORCH=OFF -DMAGE_TESTS=ON $(CMAKE_ARGS)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp
	@build/cpp/tests/cpp/mage_cpp_tests $(GTEST_ARGS)

lint:  ## check format and style of everything tracked
	@$(PREPARE) lint
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format:  ## rewrite files in the house style
	@$(PREPARE) lint
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format . && $(BIN)/clang-format -i $(CXX_FILES)

sanitize:  ## the C++ tests under compute-sanitizer; needs a Hopper GPU
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer must be on PATH (CUDA toolkit)"; exit 1; }
	@$(PREPARE) test
	@cpp=$$(ls build/cpython-*/tests/cpp/mage_cpp_tests | head -n 1); \
	for tool in memcheck racecheck; do \
	  MAGE_REQUIRE_GPU=1 compute-sanitizer --tool $$tool --error-exitcode 1 $$cpp $(GTEST_ARGS) || exit 1; \
	done

clean:  ## remove everything that was built, the environment too
	rm -rf build dist .venv .pytest_cache .hypothesis .ruff_cache python/*.egg-info
	rm -f python/mage_ext/*.so python/mage_ext/_build_info.py
