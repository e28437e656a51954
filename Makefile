# Each target sets up what it needs in .venv. ARGS adds arguments: make train ARGS='--minutes 5'
# `make sample` continues a prompt with the model that was trained last: make sample ARGS='--prompt "The "'

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

train: $(VENV)/train
	$(RUN) train.py $(ARGS)

sample: $(VENV)/train
	@model="$$(ls -td runs/*/final 2>/dev/null | head -n 1)"; \
	if [ -z "$$model" ]; then echo 'runs/ holds no trained model yet: run make train first' >&2; exit 1; fi; \
	$(RUN) -m simple_hierarchical_transformer.sample "$$model" $(ARGS)

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

# the contracts and the unit tests: all but those marked slow
fast: $(VENV)/test
	$(RUN) -m pytest -n auto --dist worksteal -m 'not slow and not gpu' $(ARGS)

docs: $(VENV)/docs
	$(RUN) -m mkdocs build --strict $(ARGS)

# one stamp for each set of packages, renewed when the files that it depends on change
$(VENV)/train $(VENV)/test $(VENV)/docs: setup.py pyproject.toml constraints.txt
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[$(notdir $@)]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info

.PHONY: train sample lint test fast docs clean
