# make demo: a small language model learns Python text. make test: every promise. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
export MAX_JOBS ?= $(JOBS)

SYSTEM_PACKAGES := ca-certificates ccache cmake g++ libgtest-dev python3-dev python3-venv
FUZZ_PACKAGES := clang libclang-rt-dev
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := setup.py pyproject.toml $(shell find csrc -type f)

NVCC ?= nvcc
NVCC_FLAGS := -std=c++17 -O3 -Icsrc -Icsrc/cuda -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fvisibility=hidden
CUDA_ARCHITECTURES := 80 90a
CUDA_HEADERS := $(wildcard csrc/*.h csrc/cuda/*.h csrc/cuda/*/*.h csrc/cuda/*/*.cuh)
CUDA_OBJECTS = $(foreach arch,$(CUDA_ARCHITECTURES),$(patsubst \
  csrc/cuda/%.cu,build/cuda-objects/%.sm_$(arch).o,$(wildcard csrc/cuda/*/*.cu)))

# Configures and builds a CMake preset.
define cmake
PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset $(1) \
  -DTorch_ROOT="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset $(1) --parallel $(JOBS)
endef

# Runs the C++ tests of a CMake preset, too.
define ctest
$(call cmake,$(1))
PATH="$(CURDIR)/$(BIN):$$PATH" ctest --preset $(1) --parallel $(JOBS)
endef

# Objects of the CUDA kernels for one architecture.
define cuda_objects
build/cuda-objects/%.sm_$(1).o: csrc/cuda/%.cu $(CUDA_HEADERS)
	@mkdir -p $$(@D)
	$(NVCC) $(NVCC_FLAGS) -gencode=arch=compute_$(1),code=sm_$(1) -c $$< -o $$@
endef

.DEFAULT_GOAL := help
.PHONY: help demo test slow versions sanitize fuzz mutants emulate cuda-objects sass api results audit lint format build tools clang system clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.built  ## train the default language model, print a sample, name the plot
	$(BIN)/python -m blurry_attn.lm train
	$(BIN)/python -m blurry_attn.lm generate

test: $(VENV)/.built  ## build, then run all tests: pytest and ctest
	$(BIN)/python -m pytest
	$(call ctest,default)

slow: $(VENV)/.built  ## run the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow -rA

versions: $(VENV)/.installed  ## build and test under several releases of Python and torch; minutes and gigabytes for each
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/tools/versions.py

sanitize: $(VENV)/.installed  ## run the C++ tests under Address- and UndefinedBehaviorSanitizer, the CPU kernels under ThreadSanitizer, and make fuzz
	$(call ctest,sanitize)
	$(call ctest,threads)
	$(MAKE) --no-print-directory fuzz SEED=1

# SEED=0 is another walk each time.
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.installed | clang  ## have libFuzzer look for calls of the CPU kernels that fail, for SECONDS=60, from SEED=0
	$(call cmake,fuzz)
	@mkdir -p build/fuzz/corpus
	cd build/fuzz && nice tests/tools/fuzz/fuzz_kernels -seed=$(SEED) -max_total_time=$(SECONDS) -max_len=256 -len_control=0 -timeout=60 \
	  -print_final_stats=1 -verbosity=0 corpus

mutants: $(VENV)/.built  ## put single faults into the CPU sources, one by one: the tests must catch each
	$(BIN)/python tests/tools/mutants.py

SEEDS ?= 0:200
emulate:  ## run the CUDA kernels on the CPU against the law in float64, on random problems SEEDS=0:200; needs g++ alone
	@$(MAKE) --no-print-directory -C tests/tools/emulator -j$(JOBS)
	build/emulator/emulate --seeds $(SEEDS)
	build/emulator/emulate-races --seeds $(SEEDS)

cuda-objects:  ## compile the CUDA kernels, warnings being errors, for two generations of cards; needs nvcc alone
	@if command -v $(NVCC) >/dev/null; then $(MAKE) --no-print-directory -j2 $(CUDA_OBJECTS); \
	else echo "cuda-objects: no nvcc here, nothing is compiled"; fi

sass: $(VENV)/.installed cuda-objects  ## check those objects' instructions: tensor cores are used, no registers spilled but those that are listed
	@! command -v $(NVCC) >/dev/null || CUDA_OBJECTS=build/cuda-objects $(BIN)/python -m pytest tests/project/test_sass.py

api: $(VENV)/.built  ## write docs/api.md from the docstrings
	$(BIN)/python docs/api.py

results: $(VENV)/.built  ## write the tables of docs/results from the result files of the benchmarks
	$(BIN)/python docs/results.py

# Strict: a pin that the service does not know is a failure, not a skip.
audit: | tools  ## ask PyPI for known vulnerabilities of what requirements/*.txt pin; needs the network
	test -x build/audit/bin/python || $(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --disable-pip --no-deps $(foreach file,$(wildcard requirements/*.txt),-r $(file))

lint: $(VENV)/.installed  ## check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.installed  ## rewrite the sources in the checked style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.built  ## set up .venv and build the extension in place

# What pip cannot install: named where it is missing, and installed where this user may.
tools:
	@missing=; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing Python's venv,"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  || missing="$$missing Python's headers,"; \
	command -v cmake >/dev/null || missing="$$missing CMake,"; \
	command -v c++ >/dev/null || missing="$$missing a C++ compiler,"; \
	echo '#include <gtest/gtest.h>' | c++ -E -x c++ - >/dev/null 2>&1 || missing="$$missing GoogleTest,"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) --no-print-directory system; \
	else echo "missing:$${missing%,}; on Debian or Ubuntu type: sudo make system" >&2; exit 1; fi

system:  ## install the system packages that building and testing need (Debian and Ubuntu, as root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES)

clang: | tools
	@if echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' \
	  | clang++ -fsanitize=fuzzer -x c++ - -o /dev/null 2>/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  $(MAKE) --no-print-directory system SYSTEM_PACKAGES="$(FUZZ_PACKAGES)"; \
	else echo 'missing: Clang with libFuzzer; on Debian type: sudo apt-get install $(FUZZ_PACKAGES)' >&2; exit 1; fi

$(VENV)/.installed: $(wildcard requirements/*.txt) | tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_FILES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(foreach arch,$(CUDA_ARCHITECTURES),$(eval $(call cuda_objects,$(arch))))

clean:  ## remove what was built; .venv stays
	rm -rf build *.egg-info blurry_attn/_C*.so blurry_attn/_build.py $(VENV)/.built
