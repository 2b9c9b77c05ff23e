# Needs python3 >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
# The stamp carries the checksum of what it installed: a .venv that is right starts at once.
READY := .venv/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: setup demo test test-all lint bench quality reference faults fuzz
setup: $(READY)

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regraft needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^uv==' constraints.txt)
	# Compiled once here: importing torch without bytecode takes up to 10 s at every start.
	UV_COMPILE_BYTECODE=1 $(BIN)/uv pip install --quiet --python $(BIN)/python \
		--constraint constraints.txt --group test --group lint --editable '.[all]'
	@rm -f .venv/ready-* && touch $(READY)

demo: setup
	$(BIN)/regraft demo --out regraft-demo/$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/pytest -n 2

test-all: setup
	$(BIN)/pytest -n 2 -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: setup
	$(BIN)/python docs/faults.py

bench: setup
	$(BIN)/python benchmarks/bench.py

quality: setup
	$(BIN)/python benchmarks/quality.py

# Random damage to images of every format, for a minute; findings are kept in fuzz-findings/.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py --seconds 60

reference: setup
	$(BIN)/python docs/make_reference.py
