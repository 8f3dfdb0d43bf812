PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test check bench clean

study: .venv/ready   ## the main job on embedded defaults: alpha x beta on glyphs
	$(BIN)/python studies/alpha_beta.py

test: .venv/ready    ## the whole test suite
	$(BIN)/python tests/isolated.py $(BIN)/python -m pytest $(ARGS)

check: .venv/ready   ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: .venv/ready   ## ratios against peers and floors, the middle of three runs, in one table
	$(BIN)/python -m tests.benchmarks --runs 3

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv || echo "no uv to be had: pip installs instead, slower"
	if [ -x $(BIN)/uv ]; then \
		$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'; \
	else \
		$(BIN)/python -m pip install --compile -c constraints.txt -e '.[dev]'; \
	fi
	touch $@

clean:               ## the environment and all runs
	rm -rf .venv runs
