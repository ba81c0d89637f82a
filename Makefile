# make train: a first model and its accuracy.   make test: linter, type checker and the fast tests, in minutes.
# make test-all: the slow tests too.   make docs: the documentation as a site in site/, with its links checked.
PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/train/first_$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: train test test-slow test-all docs

train: .venv/installed
	$(BIN)/metacv train algo=maml way=5 shot=1 hydra.run.dir=$(RUN)
	@echo
	$(BIN)/metacv evaluate checkpoint=$(RUN)
	@echo "checkpoint: $(RUN)/best.pt"
	@echo "curves:     $(BIN)/tensorboard --logdir $(RUN)   (then open http://localhost:6006)"

test: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: .venv/installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-all: test test-slow

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("metacv needs Python 3.10 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-for-tests: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
