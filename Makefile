# Everything a person or CI does, by name. The environment is made once, in .venv.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TYPES := .cache/types/servetune
DOCS := .cache/docs
FOLDERS := server adapters clients nano evals

.PHONY: setup serve test check format lint linked types audit docs reference demo bench promises soak nano clean

setup: $(STAMP)  ## make the environment; a second call does nothing

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: set PYTHON=..."; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

serve: setup  ## start the server with the embedded model, an embedded Valkey and one worker
	$(BIN)/servetune serve --port $(PORT)

test: setup  ## the whole test suite
	$(BIN)/python -m pytest

check: format lint types audit docs test  ## what CI runs

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .
	@test ! -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile

linked:  ## the import namespace as one folder, for what reads it without importing
	@mkdir -p $(TYPES)
	@for f in servetune/*.py servetune/py.typed; do ln -sfn ../../../$$f $(TYPES)/; done
	@for d in $(FOLDERS); do ln -sfn ../../../$$d $(TYPES)/$$d; done

types: setup linked
	MYPYPATH=.cache/types $(BIN)/mypy -p servetune

audit: setup  ## no secret in the repository, no known vulnerability in what is installed
	$(BIN)/python .ci/audit.py

docs: $(DOCS)/.ready linked  ## the documentation as a site in .cache/site, with whatever is wrong in it an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

reference: setup  ## write the pages in docs/reference that tell of the API, the commands and the settings
	$(BIN)/python -m docs.generate

demo: setup  ## stream images of an unseen style through the API and plot what was learned
	$(BIN)/python examples/demo.py

bench: setup  ## every benchmark; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

promises: setup  ## every promise in its short form, as kept by this machine; writes docs/promises.md
	$(BIN)/python -m benchmarks.promises --short --write docs/promises.md

soak: setup  ## promises in their long form: hours for all of them, or ROW=R1
	$(BIN)/python -m benchmarks.promises $(if $(ROW),--rows $(ROW))

nano: setup  ## train the embedded model again from the registries' packages
	$(BIN)/python -m servetune.nano.train

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
