# Two commands do everything: `make demo` and `make test`. Set-up is part of both, and always brings a CPU build of torch:
# into an environment of its own, since `.venv` is where README puts the user's torch.
PYTHON ?= python3
VENV := .venv-dev
RUN := $(VENV)/bin
TORCH := torch==2.13.0
# What compiles the kernels decides their registers and instructions, which tests look at.
TRITON := triton==3.9.0; sys_platform == 'linux'
# A CPU build that lies at hand (the folder that pip's own variable names), else PyTorch's CPU index.
LOCAL := $(if $(PIP_FIND_LINKS),$(wildcard $(PIP_FIND_LINKS)/torch-2.13.0+cpu-*.whl))
SOURCE := $(if $(LOCAL),,--torch-backend=cpu)
UV := UV_FIND_LINKS="$(if $(LOCAL),$(PIP_FIND_LINKS))" $(PYTHON) -m uv
TESTS := $(RUN)/python -m pytest -n 2 --ignore=tests/triton
# Kernels are interpreted in a process of their own: the interpreter is chosen when they are imported.
KERNELS := TRITON_INTERPRET=1 $(RUN)/python -m pytest -n 2 tests/triton
# The oldest diffusers that is claimed, laid over the newest.
FLOOR := $(VENV)/diffusers-0.36.0
OLDEST := PYTHONPATH=$(FLOOR) $(RUN)/python -m pytest -n 2 tests/test_diffusers*.py tests/test_generate*.py
# Laid over for its own tests alone: beside it the import of diffusers 0.36 fails ("name 'logger' is not defined").
TORCHAO := $(VENV)/torchao-0.18.0
QUANTISED := PYTHONPATH=$(TORCHAO) $(RUN)/python -m pytest tests/test_diffusers_hosts.py -k torchao

# The oldest Triton that is claimed, and the one of the PyTorch before the newest: every kernel must compile with them.
TRITONS := $(VENV)/triton-3.4.0 $(VENV)/triton-3.6.0
COMPILED := for triton in $(TRITONS); do PYTHONPATH=$$triton $(RUN)/python benchmarks/aot.py --arch 90 --few || exit 1; done

.PHONY: help demo test test-all lint bench docs setup clean
.DEFAULT_GOAL := help

help:
	@echo "make demo | test | test-all | lint | bench | docs | clean"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install -q uv
	@test -x $(RUN)/python || $(UV) venv -q $(VENV) --python ">=3.11"
	$(UV) pip install -q --python $(RUN)/python $(SOURCE) -e ".[dev]" "$(TORCH)" "$(TRITON)"
	@touch $@

demo: setup
	$(RUN)/psa demo

test: setup lint $(FLOOR) $(TORCHAO)
	$(TESTS) -m "not slow"
	$(KERNELS) -m "not slow"
	$(OLDEST) -m "not slow"
	$(QUANTISED)

test-all: setup lint $(FLOOR) $(TORCHAO) $(TRITONS)
	$(TESTS)
	$(KERNELS)
	$(OLDEST)
	$(QUANTISED)
	$(COMPILED)

$(FLOOR): $(VENV)/.ready
	$(UV) pip install -q --python $(RUN)/python --target $@ --no-deps diffusers==0.36.0 httpx

$(TORCHAO): $(VENV)/.ready
	$(UV) pip install -q --python $(RUN)/python --target $@ --no-deps torchao==0.18.0

$(TRITONS): $(VENV)/triton-%: $(VENV)/.ready
	$(UV) pip install -q --python $(RUN)/python --target $@ --no-deps triton==$*

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright

bench: setup
	$(RUN)/python benchmarks/cpu.py
	$(RUN)/python benchmarks/quality.py

docs: setup
	$(RUN)/python benchmarks/render.py
	$(RUN)/python docs/build_api.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis outputs
