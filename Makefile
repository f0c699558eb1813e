# make setup   the environment, .venv          make demo   the main job on the bundled images, then a table
# make test-unit, make test   the fast tests; make test-marked   what else needs no GPU
# make coverage   branches that the fast tests take
# make check   what .ci/run runs: lint, types, imports, all tests
# make docs   the pages of docs/ as a site, site/; a link that leads nowhere is an error
# make bench   how fast it is: benchmarks/README.md          make clean   moves runs and the tracking store to cleaned/
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
# modules are compiled once, not by every process of the tests
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test-unit test test-marked coverage lint docs house lock ui server bench check clean

setup: .venv/.installed

# uv is taken from the PATH, or installed into the environment that it then fills
.venv/.installed: requirements.lock
	@if command -v uv >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv --quiet --python 3.11 .venv || uv venv --quiet .venv; \
		uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	else \
		test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
		test -x $(BIN)/uv || $(BIN)/python -m pip --disable-pip-version-check install --quiet uv; \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	fi
	@touch $@
	@echo "environment ready: source .venv/bin/activate"

demo: setup
	@$(BIN)/python -m steps.main cfg=quickstart register=quickstart tracking.uri=sqlite:///$(CURDIR)/mlflow.db
	@echo
	@echo "open the UI:  make ui    (then http://127.0.0.1:5000)"

PORT ?= 5000
ui server: export MLFLOW_DISABLE_TELEMETRY = true

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

server: setup
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --artifacts-destination $(CURDIR)/mlartifacts \
		--host 127.0.0.1 --port $(PORT) --workers 1

# files are dealt to workers, long ones first (tests/conftest.py); a worker keeps a file's fixtures
# where memory has room, temporary files lie there: whatever the tests start waits for no disk
MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'END { if ($$4 > 6000000) print "TMPDIR=/dev/shm" }')
PYTEST := $(MEMORY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	-o tmp_path_retention_count=1
FAST := not slow and not gpu and not postgres and not slurm and not browser

test-unit: setup
	$(PYTEST) -m unit

test: setup
	$(PYTEST) -m "$(FAST)"

# slow, browser, postgres and slurm; they wait for others a third of their time, hence three workers
test-marked: setup
	$(PYTEST) -n 3 -m "not gpu and not ($(FAST))"

coverage: setup
	$(PYTEST) -m "$(FAST)" --cov=pipeline --cov=models --cov=steps --cov-branch --cov-report=term:skip-covered

check:
	.ci/run

# alone on the machine; CIFAR_ROOT=<folder with cifar-100-python>, else data/, else the bundled images
bench: setup
	$(BIN)/python -m benchmarks

lint: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/prose.py

# `python -m`, so that the hook finds the repository
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# lines per room, circles, arrows upward
house: setup
	$(BIN)/python tools/house.py

# the lock, and a bill of materials of it (CycloneDX)
lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --group dev --all-extras pyproject.toml -o requirements.lock
	@set -e; for folder in deploy deploy/serve; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --constraint requirements.lock $$folder/requirements.txt -o $$folder/requirements.lock; done
	$(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible -o sbom.json

# moved, not deleted: they are all experiments and registered models
clean:
	@set -- $(wildcard runs mlflow.db* mlartifacts); if (($$#)); then to=cleaned/$$(date +%Y%m%d-%H%M%S); mkdir -p "$$to"; \
		mv "$$@" "$$to"; echo "moved to $$to: $$*; delete it when nobody needs it"; else echo "nothing to move"; fi
