# Every target sets up what it needs in .venv; constraints.txt pins every version.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-faults test-long test-browser lint docs bench clean

demo: .venv/.base
	$(BIN)/actcache demo --out demo

test: .venv/.dev lint
	$(PYTEST)

test-faults: .venv/.dev
	$(PYTEST) -m faults

test-long: .venv/.dev .venv/.former
	$(PYTEST) -m 'faults or long'

test-browser: .venv/.dev
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install --yes chromium; } \
		|| { echo "no Chromium; install it: sudo apt-get update && sudo apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/trainer/report/test_browser.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# the page of the command line, from the command line itself; a test fails if it is another
docs: .venv/.dev
	$(BIN)/typer cli utils docs --name actcache --title "The command line" --output docs/reference/command-line.md

bench: .venv/.dev
	for what in harvest codecs write read feed shuffle kernels train sweep quality eval features; do $(BIN)/actcache bench $$what || exit 1; done

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# older versions of transformers, with what they need in other versions, each in a folder
.venv/.former: .venv/.dev
	for version in 5.0.0 5.12.1; do $(BIN)/python -m pip install --quiet --no-deps --target .venv/former/$$version \
		transformers==$$version tokenizers==0.22.2 huggingface_hub==1.33.0 || exit 1; done
	touch $@

clean:
	rm -rf .venv demo
