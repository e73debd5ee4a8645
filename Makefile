PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
TYPED := build/typed
USERS := .venv-users

.PHONY: demo test fuzz coverage coverage-users docs lint clean

demo: $(VENV)/installed
	$(BIN)/dspfx demo $(ARGS)

# one process for each core; make test ARGS='-n 0 -x' for one that can be watched
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# the property tests on 10,000 random networks, other ones each time
fuzz: $(VENV)/installed
	DSPFX_EXAMPLES=10000 $(BIN)/python -m pytest tests/test_properties.py tests/pruning/test_counts.py --hypothesis-profile default $(ARGS)

# every model of torchvision and every family of timm; writes docs/coverage.md
coverage: $(VENV)/installed
	$(BIN)/python -m benchmarks.coverage $(ARGS)

# models of libraries that dspfx does not know, in an environment of their own; writes docs/coverage_users.md
coverage-users: $(USERS)/installed
	$(USERS)/bin/python -m benchmarks.coverage_users $(ARGS)

# beside the packages of the first environment, torch among them
$(USERS)/installed: benchmarks/coverage_users.txt $(VENV)/installed
	$(PYTHON) -m venv --clear $(USERS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(USERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(USERS)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/coverage_users.txt
	touch $@

# the site, into site/; open site/index.html
docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html, or with search: $(PYTHON) -m http.server --directory site"

# mypy reads the package as it is installed: only there are passes/ at dspfx.passes
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TYPED) .
	cd $(TYPED) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dspfx

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,deploy,docs,plot,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) $(USERS) build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
