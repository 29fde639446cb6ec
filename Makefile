# make train | test | test-networks | test-all | operators | lint | bench | bench-full | bench-compare | wheels | gpu | clean
# Each but gpu does its own set-up in .venv; a second run is quick.
# Another torch:  make train TORCH="torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu" TRITON=triton==3.6.0

TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
BENCH  ?= .benchmarks/run.json
MINUTES ?= 6
WHEELS ?= .wheels
WHEELS_FOR ?= 3.12
RUN    ?= runs/$(basename $(notdir $(CONFIG)))

BIN   := .venv/bin
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
READY := .venv/.ready
FIRST := .venv/.torch

.PHONY: train test test-networks test-all operators lint bench bench-full bench-compare wheels gpu clean
.DEFAULT_GOAL := train

# torch goes first and pinned, with the triton that goes with it, so that no range fetches a second one.
$(FIRST):
	@echo "setting up .venv: torch and the other libraries are fetched once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(if $(filter Linux,$(shell uname)),$(BIN)/python -m pip install --quiet $(TRITON))
	@touch $@

# The packages of tests/networks would bring a torch of their own: without what they depend on.
$(READY): $(FIRST) pyproject.toml setup.py tests/networks/requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/networks/requirements.txt
	@touch $@

# A run that was interrupted goes on where it stopped; a finished one is only drawn and evaluated again.
train: $(READY)
	$(BIN)/python mmf_fast/train.py --config $(CONFIG) --run $(RUN) --resume
	$(BIN)/python -m mmf_fast sample --run $(RUN) --steps 1 --out $(RUN)/grid.png
	$(BIN)/python -m mmf_fast evaluate --run $(RUN)
	@echo "One evaluation of the network per picture: $(RUN)/grid.png (curves: $(RUN)/curves.png)"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

operators: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore -m support.operator_database > docs/operators.new
	mv docs/operators.new docs/operators.md

# Networks of other packages, unmodified; make test runs five of them.
test-networks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "" tests/networks

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick profile takes about 8 minutes on 2 cores, the full one an hour; leave the machine alone meanwhile.
bench bench-full: $(READY)
	@mkdir -p $(dir $(BENCH))
	$(BIN)/python -m pytest benchmarks --benchmark-only -s --benchmark-json=$(BENCH) $(if $(filter %-full,$@),--full)

# make bench-compare OLD=before.json [BENCH=after.json]: fails where a ratio got worse.
bench-compare: $(READY)
	$(BIN)/python -m benchmarks.compare $(OLD) $(BENCH)

# On a machine with a network: what a bare image with CUDA and PyTorch lacks, for its version of Python, under 64 MB.
wheels: $(READY)
	$(BIN)/python -m benchmarks.gpu.wheels $(WHEELS) --python $(WHEELS_FOR)

# On a machine with a GPU, network or not, in the Python that has PyTorch: every part in turn, or make gpu PART=tiles; its
# JSON goes to benchmarks/results/<device>, or to OUT=folder.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --minutes $(MINUTES) $(if $(PART),--part $(PART)) $(if $(wildcard $(WHEELS)),--wheels $(WHEELS)) $(if $(TVM),--tvm $(TVM)) $(if $(OUT),--out $(OUT))

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
