# On Linux the MLX wheel bundles the reference BLAS; OpenBLAS in front of it is about fifty times faster.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) )

.PHONY: setup demo test lint types check format smalltalk train-tiny benchmark serve clean

setup: $(STAMP)

$(STAMP): pyproject.toml tests/smalltalk/package.json
	@test -n "$(OPENBLAS)" || test "$$(uname)" != Linux || \
	  echo "Hint: libopenblas0-pthread makes MLX on Linux about fifty times faster (apt-get install libopenblas0-pthread)."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[plot]" --group dev
	npm install --prefix tests/smalltalk --no-audit --no-fund --loglevel=error
	@touch $(STAMP)

demo: setup  ## serve the bundled model, capture through the client, print what was found
	$(RUN)$(BIN)/python examples/demo.py

test: setup  ## all tests, the Smalltalk ones included
	$(RUN)$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smalltalk: setup  ## write the chunk file that ships from the Tonel sources
	$(BIN)/python scripts/build_smalltalk.py

train-tiny: setup  ## train the bundled model again, in about ten minutes; one BLAS thread is part of getting the same weights
	$(RUN)OPENBLAS_NUM_THREADS=1 PYTHONPATH=scripts $(BIN)/python -m neuroscope_tiny.train

benchmark: setup  ## what capturing costs over the plain model
	$(RUN)$(BIN)/python benchmarks/capture_overhead.py

serve: setup
	$(RUN)$(BIN)/neuroscope serve

clean:
	rm -rf $(VENV) tests/smalltalk/node_modules demo_output
