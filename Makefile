# Every target makes what it needs first: the environment in .venv, with the pinned packages.

OUT ?= demo-out
OWNERS ?= 1000
ROUNDS ?= 100
VENV := .venv
STAMP := $(VENV)/installed.stamp
BIN := $(VENV)/bin
NEEDED_KB := 4194304

export OUT
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS := 1

# The demo names its authority so; no folder without that name is ever removed.
IS_DEMO = grep -qs 'fedseal demo authority' "$$OUT/pki/issued.jsonl"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-long load check bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with the pinned packages

demo: $(STAMP) ## Run a whole federation on this machine into OUT (demo-out)
	@if [ -z "$$OUT" ]; then echo "fedseal: OUT must name a folder" >&2; exit 1; fi
	@if [ -e "$$OUT" ] && [ -n "$$(ls -A "$$OUT")" ]; then \
	  if $(IS_DEMO); then \
	    echo "fedseal: removing the earlier demo in $$OUT"; rm -rf -- "$$OUT"; \
	  else \
	    echo "fedseal: $$OUT holds something else than a demo; move it away, or give OUT=other-folder" >&2; \
	    exit 1; \
	  fi; \
	fi
	@$(BIN)/fedseal demo --out "$$OUT"

test: $(STAMP) ## Run the tests, except the long ones
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  echo "fedseal: hint: with the package chromium the report is also tested in a browser"
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder -m 'not long'

test-long: $(STAMP) ## Run all tests, the long ones too
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

load: $(STAMP) ## Run OWNERS owners (1000) for ROUNDS rounds (100) on this machine; takes hours
	FEDSEAL_LOAD_OWNERS=$(OWNERS) FEDSEAL_LOAD_ROUNDS=$(ROUNDS) \
	  $(BIN)/python -m pytest -s tests/load/test_many_owners.py

check: $(STAMP) ## Check style, types and the installed packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pip check

bench: $(STAMP) ## Measure fedseal beside other systems into bench-seal.json
	$(BIN)/fedseal bench seal --json bench-seal.json

clean: ## Remove .venv, caches and the demo's folder
	@if $(IS_DEMO); then rm -rf -- "$$OUT"; fi
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis fedseal.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@python=''; \
	for candidate in $(PYTHON) python3.11 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "fedseal: needs Python 3.11, and neither python3.11 nor python3 is one." >&2; \
	  echo "  Install it (Debian 12: apt-get install python3.11 python3.11-venv; elsewhere: pyenv or uv)," >&2; \
	  echo "  or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "fedseal: this Python has no venv module. Debian and Ubuntu: apt-get install python3.11-venv" >&2; \
	  exit 1; \
	fi; \
	free_kb="$$(df -Pk . | awk 'NR == 2 {print $$4}')"; \
	if [ ! -d $(VENV) ] && [ "$$free_kb" -lt $(NEEDED_KB) ]; then \
	  echo "fedseal: the packages need 4 GB of disk here; $$((free_kb / 1048576)) GB are free" >&2; \
	  exit 1; \
	fi; \
	if [ -x $(BIN)/python ] && \
	  ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	  echo "fedseal: $(VENV) was made by another Python; remove it (make clean) and try again" >&2; \
	  exit 1; \
	fi; \
	echo "fedseal: making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
	@echo "fedseal: installing the pinned packages; this takes a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --quiet -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "fedseal: ready"
