# `make book` and `make test` need nothing prepared but Python 3.11 to 3.13, pip and make.

PYTHON ?= python3
PORT ?= 8000
PY := .venv/bin/python
STAMP := .venv/.installed
PAGES := _build/html/.complete
BUILT := _build/html _build/.doctrees _build/jupyter_execute

export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test check format notebooks serve bench zoo clean
.DELETE_ON_ERROR:

help:  ## Say what each target does
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 18

book: $(PAGES)  ## Build the book (sets up .venv first) and say where to open it
	@$(PY) -c "import pathlib; print('Open the book:', pathlib.Path('_build/html/index.html').resolve().as_uri())"

test: check  ## Check everything that the book says: about 20 minutes on 2 cores
	$(PY) book/notebooks.py --check
	$(PY) -m pytest tests structopt README.md -n 2 --dist loadscope -m "not pages and not browser"
	$(PY) -m pytest --nbval --nbval-current-env --nbval-sanitize-with book/nbval.cfg \
	  --nbval-cell-timeout 300 -n 2 --dist loadscope book/chapters
	$(MAKE) book
	STRUCTOPT_BOOK=_build/html $(PY) -m pytest tests -m "pages or browser" -rs

check: $(STAMP)  ## Lint and types, in seconds
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(STAMP)  ## Put the code into shape
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

notebooks: $(STAMP)  ## Execute the chapters that changed
	$(PY) book/notebooks.py

serve: book  ## Show the book at http://127.0.0.1:8000 (PORT=...)
	$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

bench: $(STAMP)  ## Measure again what the benchmarks page shows
	$(PY) tests/benchmarks

zoo: $(STAMP)  ## Halve every network of the zoo anew (hours; goes on where it was interrupted)
	$(PY) -c "import timm, torch_pruning, transformers" || $(PY) -m pip install --editable '.[zoo]'
	PYTHONPATH=tests:$$PYTHONPATH $(PY) -m zoo
	PYTHONPATH=tests:$$PYTHONPATH $(PY) -m zoo.speed

clean:  ## Remove the built pages; .venv stays
	rm -rf $(BUILT) .mypy_cache .ruff_cache .hypothesis build dist

# Any change makes all pages anew: an incremental build mixes new sources with old pages.
# What long measurements keep in _build stays.
SOURCES := $(shell find book/. structopt _config.yml README.md \
  -not -path '*/__pycache__*' -not -path '*/.ipynb_checkpoints*')
$(PAGES): $(STAMP) $(SOURCES)
	rm -rf $(BUILT)
	$(PY) -c "from jupyter_book.cli.main import main; main()" build book -W --keep-going -n -q
	touch $@

# A .venv that is there already is kept, with the build of torch that is in it.
$(STAMP): pyproject.toml | $(PY)
	$(PY) -m pip install --editable '.[dev]'
	touch $@

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" || \
	  { echo "This needs Python 3.11, 3.12 or 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
