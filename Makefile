# Two commands do everything on a fresh machine: `make demo` and `make test`.

# The two environments of `make test` are installed side by side.
MAKEFLAGS += --jobs=2
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two files at a time, the long ones first (see testpaths).
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
TASK ?= copy
RANKS ?= 3
DEMO := .cache/demo
SGLANG := .cache/sglang
SGLANG_SOURCES := $(wildcard tests/helpers/sglang_cpu/*)
# What the demo trains with; the check of its export finds the run's directory by the same words.
DEMO_RUN = conf=demo_cpu data=demo_$(TASK) $(ARGS)

.PHONY: demo sglang test test-fast test-long test-faults lint docs clean

# The reference lane: CPU, versions pinned in constraints.txt. torch goes first so that its exact pin is
# met before any other package asks for a range.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $$(grep -E '^torch==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	touch $@

$(DEMO)/complete: $(VENV)/installed tools/prepare_demo.py
	$(BIN)/python tools/prepare_demo.py --out $(DEMO)
	touch $@

demo: $(DEMO)/complete
	$(BIN)/torchrun --nproc-per-node $(RANKS) -m megaopd.train $(DEMO_RUN)
	$(BIN)/python tools/check_export.py $(DEMO_RUN)

# SGLang for this CPU in an environment of its own, in which the tests start real servers.
$(SGLANG)/installed: $(SGLANG_SOURCES)
	rm -rf $(SGLANG)
	tests/helpers/sglang_cpu/install.sh $(SGLANG) $(PYTHON)
	touch $@

sglang: $(SGLANG)/installed

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(DEMO)/complete $(SGLANG)/installed
	$(PYTEST) --durations=30 --durations-min=5

# The faults that `make test` injects a few times, many times: ten minutes on 2 cores. What was seen goes
# into the documentation.
test-faults: $(VENV)/installed
	FAULTS_TABLE=docs/reliability.md \
		$(PYTEST) -m slow -k "not short" tests/faults

# The rest of the matrices of which `make test` runs the corners: every kind of compiled kernel, longer
# training curves.
test-long: $(VENV)/installed $(DEMO)/complete
	$(PYTEST) -m long --ignore=tests/faults

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow"

docs: $(VENV)/installed
	$(BIN)/python -m megaopd.config --markdown > docs/configuration.md

clean:
	rm -rf $(VENV) .cache runs
