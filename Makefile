PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
TYPED := build/typed

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/dspfx demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

# mypy reads the package as it is installed: only there are passes/ at dspfx.passes
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TYPED) .
	cd $(TYPED) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dspfx

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
