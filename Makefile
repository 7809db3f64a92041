# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin
# The demo mounts, which needs root. Tests without root leave out those that mount.
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

.PHONY: demo test check format bench clean

demo: $(READY)
	@$(SUDO) $(RUN)/lamina demo

test: $(READY)
	$(RUN)/pytest -n auto --maxprocesses=4 --dist=worksteal

check: $(READY)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

format: $(READY)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

bench: $(READY)
	$(SUDO) $(RUN)/python -m benchmarks unpack large

clean:
	rm -rf $(VENV) build *.egg-info

# Debian and Ubuntu keep venv in a package of its own; root can have it installed on the way.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'lamina needs Python 3.11 or later: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null \
	       && $(PYTHON) -m venv --clear $(VENV); } \
	  || { echo 'no venv module: sudo apt-get install python3-venv'; exit 1; }
	@echo 'installing what lamina needs into $(VENV)'
	@$(RUN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# As an ordinary install does: each command and worker starts in half the time.
	@$(RUN)/python -m compileall -q engine snapshotters
	@touch $(READY)
