# make demo   set up .venv and run the main job, the comparison of LIF and QIF in both hosts
# make test   set up .venv and run every test, against SpikingJelly 2.0.0 and again against 0.0.0.0.14
# make gpu MINUTES=8   all that waits for a CUDA card;   make wheels   what benchmarks/gpu.py needs offline, into wheels/
# make lint   ruff and mypy;   make docs   build the documentation;   make versions   what is installed and runs here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD_SPIKINGJELLY := $(VENV)/spikingjelly-0.0.0.0.14
READY := $(VENV)/.ready

.PHONY: demo test test-new test-old gpu wheels lint docs versions clean

demo: $(READY)
	$(BIN)/qif compare

# Workers run whole files, whose tests share what is costly to set up, with one thread each. One worker more than cores,
# since many tests wait for processes of their own: on two cores it saves a third of the time.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() + 1))")
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test: test-new test-old

test-new: $(READY)
	$(PYTEST)

test-old: $(READY)
	PYTHONPATH=$(CURDIR)/$(OLD_SPIKINGJELLY) $(PYTEST) -m "not host_independent"

MINUTES ?= 8
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) --old-spikingjelly $(OLD_SPIKINGJELLY)

# For a machine with PyTorch, CuPy, pytest, pytest-timeout and hypothesis; pip downloads one version of a package a call.
wheels:
	$(PYTHON) -m pip download --quiet --no-deps --dest wheels spikingjelly==2.0.0 snntorch==1.0.0 loguru SciencePlots
	$(PYTHON) -m pip download --quiet --no-deps --dest wheels spikingjelly==0.0.0.0.14

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

versions: $(READY)
	@$(BIN)/qif doctor
	@$(BIN)/pip list --format=freeze | grep -E '^(numpy|torchvision|lightning|accelerate|hypothesis|pytest|ruff|mypy)=='

# The stamp is written last, so that an interrupted set-up starts over.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	rm -rf $(OLD_SPIKINGJELLY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLD_SPIKINGJELLY) spikingjelly==0.0.0.0.14
	touch $(READY)

clean:
	rm -rf $(VENV) wheels build dist site *.egg-info
