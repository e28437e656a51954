# Two commands do all set-up: `make train` and `make test`, each in an environment of its own in .venv

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

train: $(VENV)/train
	$(RUN) train.py $(ARGS)

test: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest $(ARGS)

# one stamp for each set of packages, made anew when what it was made from changes
$(VENV)/train $(VENV)/test: setup.py pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[$(notdir $@)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

.PHONY: train test clean
