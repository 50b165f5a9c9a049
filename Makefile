# The two commands of the README, and the checks of CONTRIBUTING.md. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint docs docs-links mutations zoo attack-cost kinks agreement step-cost memory attention

quickstart: $(VENV)/quickstart.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -W error --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/lint.installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# The site, in results/docs: every code block is run, and a warning is an error.
docs: $(VENV)/docs.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env docs results/docs

docs-links: $(VENV)/docs.installed  # needs the network
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --builder linkcheck docs results/links

# Half an hour on two cores. Of any other module: make mutations MODULES="point.py smooth/probe.py"
MODULES ?= replay.py differentiation.py attacks/single_step.py
mutations: $(VENV)/test.installed
	$(BIN)/python tests/mutations.py $(MODULES)

# All models of tests/zoo.py, of which `make test` takes a sample: an hour and a half.
zoo: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/zoo.py
	$(BIN)/python -m pytest -W error tests/integration/test_zoo.py --zoo

kinks: $(VENV)/quickstart.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kinks.py --threads 1

# The C library keeps the memory that it has, or it would give it back and ask again at every step (benchmarks/README.md).
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
BENCHMARK := $(KEEP_MEMORY) OMP_NUM_THREADS=1 $(BIN)/python

agreement: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/agreement.py

step-cost: $(VENV)/test.installed
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --rounds 60 --compile
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --model resnet18 --rounds 8 --warm-up 1 --compile
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --model resnet18 --dtype bfloat16 --rounds 4 --warm-up 1
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --model resnet50 --rounds 3 --warm-up 1
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --model vit_tiny --rounds 3 --warm-up 1
	$(BENCHMARK) benchmarks/step_cost.py --threads 1 --model swin_tiny --rounds 2 --warm-up 1

memory: $(VENV)/test.installed
	$(BENCHMARK) benchmarks/memory.py --threads 1
	$(BENCHMARK) benchmarks/memory.py --threads 1 --model resnet18 --batch-size 64 --rounds 1

attention: $(VENV)/test.installed
	$(BENCHMARK) benchmarks/attention.py --threads 1 --rounds 1

# In an environment of its own: one of the libraries that it compares with pins old packages.
attack-cost: $(VENV)-attack-cost/installed
	$(VENV)-attack-cost/bin/python benchmarks/attack_cost.py --threads 1
	$(VENV)-attack-cost/bin/python benchmarks/attack_cost.py --threads 1 --model resnet18 --rounds 10

$(VENV)-attack-cost/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-attack-cost
	$(VENV)-attack-cost/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-attack-cost/bin/python -m pip install --quiet --editable . --group attack-cost
	touch $@

$(VENV)/pip.installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/%.installed: $(VENV)/pip.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable . --group $*
	touch $@
