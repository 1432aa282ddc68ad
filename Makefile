# Every target prepares .venv by itself on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo examples pictures test sweep bench lint docs notebook clean

demo: $(STAMP)
	$(BIN)/python examples/tour.py $(ARGS)

EXAMPLES := $(filter-out build_notebook support tour,$(basename $(notdir $(wildcard examples/*.py))))

examples: $(STAMP)
	@mkdir -p examples/pictures; failed=; \
	for name in $(EXAMPLES); do \
		$(BIN)/python examples/$$name.py --picture examples/pictures/$$name.png $(ARGS) || failed="$$failed $$name"; echo; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# Those that the documentation shows.
pictures: $(STAMP)
	for name in $(EXAMPLES); do \
		$(BIN)/python examples/$$name.py --small --picture docs/pictures/$$name.png || exit 1; \
	done

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

sweep: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)
	$(BIN)/python tests/batching/sweep_operator_database.py
	$(BIN)/python tests/rules/sweep_operator_database.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python -m pytest -n 2 tests/test_documentation.py

notebook: $(STAMP)
	$(BIN)/python examples/build_notebook.py

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/chainrule/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --only-binary :all: cyipopt-wheels \
		|| echo "no wheel of cyipopt for this machine: its test is skipped"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist
