# On Linux the MLX wheel bundles the reference BLAS; with OpenBLAS in front of it a forward pass is some 27 times faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
AMBER := tests/smalltalk/node_modules/amber/package.json
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) )
PYTEST = $(RUN)OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
# A virtual environment holds absolute paths: it is stale when the folder was moved or its interpreter is gone.
FRESH := $(shell test "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" && $(BIN)/python -c "" 2>/dev/null && echo yes)

.PHONY: setup demo test lint types check format smalltalk train-tiny benchmark serve clean FORCE

setup: $(STAMP) $(AMBER)  ## .venv with everything in it, and Amber for the Smalltalk tests

$(STAMP): pyproject.toml $(if $(FRESH),,FORCE)
	@test -n "$(OPENBLAS)" || test "$$(uname)" != Linux || \
	  echo "Hint: on Linux libopenblas0-pthread makes MLX many times faster (apt-get install libopenblas0-pthread)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	@echo "Setting up $(VENV) ..."
	@test "$(FRESH)" = yes || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --editable ".[plot,s3]" --group dev
	@echo "$(CURDIR)" > $(STAMP)

$(AMBER): tests/smalltalk/package.json
	@command -v npm >/dev/null || { echo "Node 18 or newer with npm is needed for the Smalltalk tests." >&2; exit 1; }
	@npm install --prefix tests/smalltalk --no-audit --no-fund --loglevel=error
	@touch $(AMBER)

demo: $(STAMP)  ## serve the bundled model, capture through the client, print what was found
	$(RUN)$(BIN)/python examples/demo.py

test: setup  ## all tests, the Smalltalk ones included, in two processes; ARGS="tests/test_server.py" for some
	$(PYTEST) $(or $(ARGS),-n 2 --dist loadfile)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test  ## what CI runs

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python scripts/format_smalltalk.py

serve: $(STAMP)  ## the server on http://127.0.0.1:8080; ARGS="--model neuroscope-tiny"
	$(RUN)$(BIN)/python -m api_server $(ARGS)

smalltalk: $(STAMP)  ## write the chunk file that ships from the Tonel sources
	$(BIN)/python scripts/build_smalltalk.py

train-tiny: $(STAMP)  ## train the bundled model again, in about ten minutes; one BLAS thread is part of getting the same weights
	$(RUN)OPENBLAS_NUM_THREADS=1 PYTHONPATH=scripts $(BIN)/python -m neuroscope_tiny.train

benchmark: $(STAMP)  ## what capturing costs over the plain model; writes docs/benchmarks.md
	$(RUN)$(BIN)/python benchmarks/capture_overhead.py $(ARGS)

clean:
	rm -rf $(VENV) tests/smalltalk/node_modules demo_output
