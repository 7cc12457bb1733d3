# `make run` serves, `make test` tests; both install what they need into .venv first.

PYTHON ?= python3
ARCH ?= alexnet
WEIGHTS ?= pretrained
PRECISION ?= fp32
OUT ?= model
# Of make bench: exported models, and the picture that is sent.
MODEL ?= model
REQUEST ?= examples/input.json
SECONDS ?= 5
ROUNDS ?= 3
MINUTES ?= 30
OVERLOAD_SECONDS ?= 60

VENV := .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help run model test test-ray chaos bench overload soak lint proto constraints clean

help:
	@echo "make run     serve AlexNet on ports 8080 (HTTP) and 8081 (gRPC), exporting it first if model/ is empty"
	@echo "make model   export: ARCH=alexnet WEIGHTS=pretrained|auto|seeded:N|FILE.pth PRECISION=fp32|fp16|int8 OUT=model"
	@echo "make test    run the tests"
	@echo "make test-ray   run the tests of --engine=ray, which installs Ray"
	@echo "make chaos   stop it at full load again and again, and ask it 10,000 hostile things: ten minutes"
	@echo "make bench   measure the server: MODEL=model REQUEST=examples/input.json SECONDS=5 ROUNDS=3"
	@echo "make overload   send twice what the server can answer for OVERLOAD_SECONDS=60"
	@echo "make soak    load the server for MINUTES=30, and watch its memory"
	@echo "make lint    ruff and mypy"
	@echo "make proto   generate pinnace/proto/generated from the .proto files"
	@echo "make constraints   pin what the requirements require in constraints.txt; UPGRADE=--upgrade takes new releases"
	@echo "make clean   remove the environments and the exported model"

run: $(VENV)/.runtime model/model.onnx
	exec $(VENV)/bin/python app.py --model_name=custom-model

model/model.onnx:
	$(MAKE) model WEIGHTS=auto OUT=model

model: $(VENV)/.export
	$(VENV)/bin/python -m model_export --arch $(ARCH) --weights $(WEIGHTS) --precision $(PRECISION) --output $(OUT)

test: $(VENV)/.dev .venv-kserve/.kserve
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-ray: $(VENV)/.dev $(VENV)/.ray
	TEST_RAY=1 $(VENV)/bin/python -m pytest tests/test_ray_model.py tests/test_ray_app.py

chaos: $(VENV)/.dev
	TEST_CHAOS=1 $(VENV)/bin/python -m pytest -m slow tests/test_drain.py tests/test_chaos.py

bench: $(VENV)/.dev $(addsuffix /model.onnx,$(MODEL))
	$(VENV)/bin/python -m bench $(addprefix --model ,$(MODEL)) --request $(REQUEST) --seconds $(SECONDS) --rounds $(ROUNDS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

overload: $(VENV)/.dev $(MODEL)/model.onnx
	$(VENV)/bin/python -m bench.overload --model $(MODEL) --request $(REQUEST) --seconds $(OVERLOAD_SECONDS)

soak: $(VENV)/.dev $(MODEL)/model.onnx
	$(VENV)/bin/python -m bench.soak --model $(MODEL) --request $(REQUEST) --minutes $(MINUTES)

proto: $(VENV)/.dev
	rm -rf pinnace/proto/generated
	$(VENV)/bin/python -m proto.generate

# For Python 3.11 and newer. The GPU's requirements are left out: the export's torch needs other releases of CUDA's.
constraints: $(VENV)/bin/python
	$(PIP) uv==0.13.9
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --strip-extras --no-emit-index-url --no-annotate \
	  $(UPGRADE) --output-file constraints.txt \
	  requirements/base.txt requirements/cpu.txt requirements/ray.txt requirements/storage.txt

clean:
	rm -rf build dist *.egg-info $(VENV) .venv-kserve model bench.png soak.png .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is not Python 3.11 or newer, or lacks venv (Debian: python3-venv): see make … PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The empty files say which requirements are installed, and since when.
$(VENV)/.runtime: requirements.txt requirements/base.txt requirements/cpu.txt constraints.txt | $(VENV)/bin/python
	@echo "installing the server's requirements"
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.export: requirements-export.txt requirements/export.txt model_export/install.sh $(VENV)/.runtime
	@echo "installing torch and torchvision for the export: a few minutes"
	@PIP="$(VENV)/bin/python -m pip" sh model_export/install.sh $(VENV)/bin/python
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.export
	@echo "installing the test tools"
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/.ray: requirements-ray.txt requirements/ray.txt $(VENV)/.runtime
	@echo "installing Ray"
	$(PIP) -r requirements-ray.txt
	@touch $@

.venv-kserve/.kserve: requirements-kserve.txt
	@echo "installing KServe's clients for the tests"
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-kserve.txt
	@touch $@
