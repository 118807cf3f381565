# make demo    prune, compile and measure a real model (a few minutes)
# make test    the test suite, on every ISA row of this machine
# make lint    ruff, mypy, clang-format
# make wheel   a manylinux wheel in wheelhouse/, tested where there is no compiler
# make performance   measure the kernels (three quarters of an hour, on a quiet machine) and write docs/performance.md
# make soak    sixteen streaming clients for ten minutes; MINUTES=2 makes it two
# make clean   remove everything that these made
#
# Everything happens in .venv. Stamps in it say what is installed, so that a second run starts at once; the package is
# installed, not linked, and installed anew when one of its sources is newer than the stamp.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/done
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
# Tests run in a process for each core.
SPREAD := --numprocesses auto --dist worksteal
# The packages that a list of pyproject.toml names: $(call listed,project.dependencies)
listed  = $$($(BIN)/python tools/requirements.py $(1))
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE \
           $(shell find src csrc cmake -name __pycache__ -prune -o -print 2>/dev/null)

.PHONY: demo test lint wheel performance soak clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(DONE)/package $(DONE)/demo
	$(BIN)/zeroskip demo

# The whole suite runs on the best row of this CPU, the tests of the kernels on every lower one as well.
test: $(DONE)/package $(DONE)/serve $(DONE)/test
	$(BIN)/pytest $(SPREAD)
	@set -e; for row in $$($(BIN)/python -c "import zeroskip; print(*zeroskip.isa().available[:-1])"); do \
	  echo "ZEROSKIP_ISA=$$row"; ZEROSKIP_ISA=$$row $(BIN)/pytest $(SPREAD) -m kernels; \
	done

lint: $(DONE)/dependencies $(DONE)/serve $(DONE)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

wheel: $(DONE)/build $(DONE)/wheel
	rm -rf dist wheelhouse build/clean
	$(BIN)/python -m pip --quiet wheel --no-deps --no-build-isolation --wheel-dir dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir wheelhouse dist/*.whl
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt \
	  wheelhouse/*.whl $(call listed,project.optional-dependencies.test)
	@echo "testing the wheel with no compiler on the path"
	env --ignore-environment HOME="$$HOME" PATH="$(CURDIR)/build/clean/bin" build/clean/bin/pytest -m kernels

# With the peers that are installed: `.venv/bin/zeroskip bench peers`.
performance: $(DONE)/package
	@mkdir -p build
	@set -e; for suite in llm:15 encoder:15 synthetic:15; do \
	  $(BIN)/zeroskip bench kernels --suite $${suite%:*} --threads 1,2 --peers auto --budget $${suite#*:} \
	    --json build/$${suite%:*}.json; \
	  $(BIN)/zeroskip bench report build/$${suite%:*}.json --into docs/performance.md; \
	done

MINUTES ?= 10
soak: $(DONE)/package $(DONE)/serve $(DONE)/test
	$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build dist wheelhouse demo-model demo-model.partial demo.json \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) tools/check_python.py
	$(PYTHON) -m venv $(VENV)

$(DONE)/dependencies: pyproject.toml constraints.txt | $(VENV)/bin/python
	@mkdir -p $(DONE)
	@echo "installing torch, transformers and the other dependencies (a minute or so)"
	$(PIP) $(call listed,project.dependencies)
	@touch $@

# What builds the package lives in .venv too: building there again compiles only what changed.
$(DONE)/build: pyproject.toml | $(DONE)/dependencies
	$(PIP) cmake ninja $(call listed,build-system.requires)
	@touch $@

$(DONE)/package: $(SOURCES) $(DONE)/dependencies $(DONE)/build
	@echo "building and installing zeroskip"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

$(DONE)/demo $(DONE)/serve $(DONE)/test $(DONE)/lint $(DONE)/wheel: pyproject.toml | $(DONE)/dependencies
	$(PIP) $(call listed,project.optional-dependencies.$(@F))
	@touch $@
