# Each target sets up what it needs by itself, in .venv: `make quickstart` is all a newcomer types.
PYTHON ?= python3
WORKDIR ?= runs/quickstart
DOCS ?= dist/docs
RUN := .venv/bin/python
# A file's tests stay together, for they share fixtures and programs, until a worker has none left.
MODULES := $(patsubst infsub/%,infsub.%,$(basename $(wildcard infsub/[a-z]*.py)) infsub/data infsub/report)
PYTEST := -m pytest -n 2 --dist=worksteal
# Where it is set, every process compiles the thousand modules of jax anew: six seconds each time.
unexport PYTHONDONTWRITEBYTECODE

quickstart: .venv/plots.done  ## train, evaluate and report on real digits
	$(RUN) -m infsub.main --config=configs/quickstart.py --workdir=$(WORKDIR)

test: .venv/dev.done  ## the tests
	$(RUN) $(PYTEST) -m 'not slow'

test-slow: .venv/dev.done  ## the tests that take minutes; CI runs both
	$(RUN) $(PYTEST) -m 'slow and not thorough'

test-thorough: .venv/dev.done  ## the rest: examples, notebook, sweeps, kills, full disks
	$(RUN) $(PYTEST) -m thorough

test-lowest: .venv/bin/uv  ## the tests with the lowest versions that pyproject.toml allows
	.venv/bin/uv venv --quiet --clear --python $(RUN) .venv/lowest
	.venv/bin/uv pip install --quiet --python .venv/lowest --resolution lowest-direct \
		-r pyproject.toml --extra plots --extra dev
	.venv/bin/uv pip install --quiet --python .venv/lowest --no-deps --editable .
	.venv/lowest/bin/python $(PYTEST) -m 'not slow' -W default  # old versions warn, and may

lint: .venv/dev.done  ## formatting, lint, types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright

bench: .venv/bench.done  ## benchmarks in one table and runs/bench.json: on an otherwise idle machine
	$(RUN) tests/benchmarks/run.py

docs: .venv/dev.done  ## pages of the API from its docstrings, in dist/docs
	$(RUN) -W 'ignore:Error parsing type' -W 'ignore:The module specification' -m pdoc --docformat google \
		--output-directory $(DOCS) infsub $(MODULES)

faults: .venv/dev.done  ## kills in every phase and shard, and concurrent starts, with their figures
	$(RUN) tests/faults.py

results: .venv/plots.done  ## configs/paper/results/README.md and its figures, from the committed rows
	$(RUN) configs/paper/results/make.py

wheel: .venv/bin/uv  ## build the wheel, install it alone, and import it
	.venv/bin/uv build --quiet --wheel --out-dir dist
	.venv/bin/uv run --quiet --isolated --no-project --with dist/*.whl \
		python -c "import infsub, infsub.data as d; print(d.load('mnist5k').test.size, 'digits')"

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet 'uv>=0.8,<1'

# uv keeps the environment exactly as uv.lock says; --inexact leaves uv itself in place.
.venv/plots.done: .venv/bin/uv pyproject.toml uv.lock
	.venv/bin/uv sync --quiet --frozen --inexact --extra plots
	touch $@

.venv/dev.done: .venv/bin/uv pyproject.toml uv.lock
	.venv/bin/uv sync --quiet --frozen --inexact --extra plots --extra dev --extra examples
	touch $@

.venv/bench.done: .venv/dev.done
	.venv/bin/uv sync --quiet --frozen --inexact --extra plots --extra dev --extra examples --extra bench
	touch $@

clean:  ## everything that can be made again, except runs/
	rm -rf .venv dist .pytest_cache .ruff_cache

.PHONY: quickstart test test-slow test-thorough test-lowest lint bench docs faults results wheel clean
