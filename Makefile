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
# Of make test-pythons: interpreters, as names on the PATH or as files.
PYTHONS ?= python3.12 python3.13
# Of make test-pythons: the tests to run; all by default.
TESTS ?=

VENV := .venv
# Of make test-pythons: the model that the tests use where torch is not installed.
TEST_MODEL := $(CURDIR)/.venv/test-model
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help run model test test-all test-ray test-pythons test-python chaos bench overload soak lint proto constraints clean

help:
	@echo "make run     serve AlexNet on ports 8080 (HTTP) and 8081 (gRPC), exporting it first if model/ is empty"
	@echo "make model   export: ARCH=alexnet WEIGHTS=pretrained|auto|seeded:N|FILE.pth PRECISION=fp32|fp16|int8 OUT=model"
	@echo "make test    run the tests but for the slow ones: six to eleven minutes"
	@echo "make test-all   run the slow tests, which make test skips: ten to twenty minutes"
	@echo "make test-ray   run the tests of --engine=ray, which installs Ray"
	@echo "make test-pythons   run the tests that need no torch on other versions: PYTHONS=\"python3.12 python3.13\""
	@echo "make chaos   of the slow tests those that stop the server at full load, and send it 10,000 hostile requests"
	@echo "make bench   measure the server: MODEL=model REQUEST=examples/input.json SECONDS=5 ROUNDS=3"
	@echo "make overload   send twice what the server can answer for OVERLOAD_SECONDS=60"
	@echo "make soak    load the server for MINUTES=30, and watch its memory"
	@echo "make lint    ruff, mypy and import-linter"
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

test-all: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow

test-ray: $(VENV)/.dev $(VENV)/.ray
	$(VENV)/bin/python -m pytest -m ray

# Each interpreter gets an environment of its own, .venv-3.12 for python3.12; all use the model that .venv exported.
test-pythons: $(TEST_MODEL)/model.onnx
	@set -e; for python in $(PYTHONS); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  $(MAKE) --no-print-directory test-python PYTHON=$$python VENV=.venv-$$version; \
	done

test-python: $(VENV)/.test
	TEST_MODEL_DIR=$(TEST_MODEL) $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

$(TEST_MODEL)/model.onnx: $(VENV)/.export $(wildcard model_export/*.py)
	$(VENV)/bin/python -m model_export --weights seeded:0 --output $(TEST_MODEL)

chaos: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow tests/test_drain.py tests/test_chaos.py tests/test_attacks.py

bench: $(VENV)/.dev $(addsuffix /model.onnx,$(MODEL))
	$(VENV)/bin/python -m bench $(addprefix --model ,$(MODEL)) --request $(REQUEST) --seconds $(SECONDS) --rounds $(ROUNDS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

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
	rm -rf build dist *.egg-info $(VENV) .venv-* model bench.png soak.png .mypy_cache .ruff_cache .import_linter_cache .pytest_cache \
	  .hypothesis

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

$(VENV)/.test: requirements-test.txt requirements-storage.txt $(VENV)/.runtime
	@echo "installing the test tools"
	$(PIP) -r requirements-test.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-test.txt requirements-storage.txt $(VENV)/.export
	@echo "installing the tools of tests and lint"
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
