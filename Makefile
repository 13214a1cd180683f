# `make help` lists the targets.
SHELL := /bin/sh
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(PY) $(INSTALL)
TORCH := torch==2.13.0

hash = $(shell cat $(1) | sha256sum | cut -c 1-16)
CPU := $(VENV)/.cpu-$(call hash,requirements/cpu.txt)
CONFORMANCE := .venv-conformance/.made-$(call hash,requirements/conformance.txt)
TEST := $(VENV)/.test-$(call hash,requirements/cpu.txt requirements/test.txt)

# One thread each: threads of two processes that wait for one another on two cores take many times as long.
TWO_AT_ONCE := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m pytest -n 2 --dist loadfile

PROTOS := $(wildcard proto/rudder/v1/*.proto)
PROTOC := $(PY) -m grpc_tools.protoc -Iproto

.PHONY: help venv demo serve test lint types proto proto-check unit engine-test e2e conformance clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' Makefile | expand -t 16

venv: $(CPU) ## create .venv with the pinned CPU stack

demo: $(CPU) ## start a server, take the tour of it, stop it
	@$(PY) -m rudder.server demo

serve: $(CPU) ## start a server with the shipped model and stay; FLAGS="--listen.port 50052 …"
	@$(PY) -m rudder.server serve $(FLAGS)

test: lint types proto-check unit engine-test e2e conformance ## everything that CI runs

lint: $(TEST) ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(TEST) ## mypy
	$(PY) -m mypy

unit: $(TEST) ## tests of parts, in seconds
	$(TWO_AT_ONCE) tests/unit

engine-test: $(TEST) ## tests against a vLLM engine
	$(TWO_AT_ONCE) tests/engine

e2e: $(TEST) ## tests against a server process
	$(TWO_AT_ONCE) tests/e2e

conformance: $(CONFORMANCE) ## tests against the libraries whose formats are read
	.venv-conformance/bin/python -m pytest tests/conformance

proto: $(TEST) ## regenerate the Python code of the contract
	$(call generate,clients/python)

proto-check: $(TEST) ## the committed code is what the contract generates
	@rm -rf build/proto && mkdir -p build/proto
	$(call generate,build/proto)
	@for file in build/proto/rudder/v1/*; do cmp "$$file" clients/python/rudder/v1/"$$(basename "$$file")" || exit 1; done

clean: ## remove what was made here, both .venv included
	rm -rf $(VENV) .venv-conformance build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info clients/python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define generate
$(PROTOC) --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
endef

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("Rudder needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# Packages are pinned to a whole set that works, so pip need not resolve it: see requirements/cpu.txt.
$(CPU): requirements/cpu.txt pyproject.toml clients/python/pyproject.toml | $(PY)
	@echo "installing the CPU stack into $(VENV) (some minutes)"
	@rm -f $(VENV)/.cpu-*
	$(PIP) --constraint requirements/cpu.txt $(TORCH)
	$(PIP) --no-deps --requirement requirements/cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable . --editable clients/python
	@touch $@

$(TEST): requirements/test.txt $(CPU)
	@rm -f $(VENV)/.test-*
	$(PIP) --no-deps --requirement requirements/test.txt
	@touch $@

$(CONFORMANCE): requirements/conformance.txt
	@echo "installing the libraries of the conformance tests into .venv-conformance"
	@rm -rf .venv-conformance
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/python $(INSTALL) --constraint $< $(TORCH)
	.venv-conformance/bin/python $(INSTALL) --no-deps --requirement $<
	@touch $@
