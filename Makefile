# Two commands do all set-up: `make train` and `make test`, in an environment of their own in .venv.
# `make sample` goes on from a prompt with the model trained last: make sample ARGS='--prompt "The "'

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

train: $(VENV)/train
	$(RUN) train.py $(ARGS)

sample: $(VENV)/train
	$(RUN) -m simple_hierarchical_transformer.sample "$$(ls -td runs/*/final | head -n 1)" $(ARGS)

test: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

# the contracts and the unit tests: all but those marked slow
fast: $(VENV)/test
	$(RUN) -m pytest -n auto --dist worksteal -m 'not slow and not gpu' $(ARGS)

# one stamp for each set of packages, made anew when what it was made from changes
$(VENV)/train $(VENV)/test: setup.py pyproject.toml constraints.txt
	$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[$(notdir $@)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

.PHONY: train sample test fast clean
