# make demo: a small language model learns Python text. make test: every promise. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
export MAX_JOBS ?= $(JOBS)

SYSTEM_PACKAGES := ca-certificates ccache cmake g++ libgtest-dev python3-dev python3-venv
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := setup.py pyproject.toml $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format build tools system clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.built  ## train the default language model, print a sample, name the plot
	$(BIN)/python -m blurry_attn.lm train
	$(BIN)/python -m blurry_attn.lm generate

test: $(VENV)/.built  ## build, then run all tests: pytest and ctest
	$(BIN)/python -m pytest
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --preset default \
	  -DTorch_ROOT="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build --preset default --parallel $(JOBS)
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --preset default --parallel $(JOBS)

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

$(VENV)/.installed: $(wildcard requirements/*.txt) | tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_FILES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:  ## remove what was built; .venv stays
	rm -rf build *.egg-info blurry_attn/_C*.so blurry_attn/_build.py $(VENV)/.built
