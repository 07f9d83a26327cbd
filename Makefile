# Every target does its own set-up: a virtual environment, torch, the build, the dependencies.
#
#   TORCH    what pip installs as torch; any release >= 2.10, and any pip option, such as an index of CPU wheels:
#            make test TORCH="torch --index-url URL". `make test TORCH= VENV_FLAGS=--system-site-packages` takes
#            the torch that is installed already.
#   VENV     where the environment goes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
VENV_FLAGS ?=
ARGS ?=

# Tests run side by side, a file at a time where fixtures serve a whole file; ARGS="-n 0" runs them one by one.
PARALLEL := -n auto --maxprocesses 8

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-triton test-cuda lint types bench mutants gpu-check package clean

# A thread that waits must not keep another test from the processor.
test test-triton test-cuda: export OMP_WAIT_POLICY := passive

demo: $(VENV)/.examples
	$(BIN)/python examples/distill_glue.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) --dist loadfile $(ARGS)

# The same parity tests on the Triton kernels, run on the CPU by Triton's interpreter: some minutes, no GPU needed.
test-triton: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) --backends triton tests/test_parity.py tests/test_masking.py tests/test_layer_maps.py tests/test_numerics.py tests/test_backward.py tests/test_triton.py tests/test_properties.py $(ARGS)

# The parity tests on the CUDA kernels, compiled for the CPU by tests/cuda_emulation: without a GPU, and without nvcc. Then
# on a device with room for every row at a time, where few rows have a kernel of their own.
EMULATED := ALPKD_EMULATE_CUDA=1 $(BIN)/python -m pytest $(PARALLEL) --backends cuda $(addprefix tests/test_,$(addsuffix .py,backward gradients layer_maps masking numerics operator options parity pooling strides)) $(ARGS)
test-cuda: $(VENV)/.dev
	$(EMULATED)
	ALPKD_EMULATION_DEVICE=12 $(EMULATED)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks $(ARGS)

# Breaks the kernels on purpose, one fault at a time, and demands that the tests notice each.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(ARGS)

# Compiles every GPU kernel for the cards it may meet and checks what came out; needs no GPU.
gpu-check: $(VENV)/.dev
	$(BIN)/python -m alpkd_fast.kernels.check $(if $(ALL),--all) $(ARGS)
	$(BIN)/python csrc/cuda/check.py

# The source distribution, and a wheel made from it with the objects that are compiled already.
package: $(VENV)/.dev
	rm -rf dist build/sdist
	$(BIN)/python -m build --no-isolation --sdist
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	mkdir -p build/sdist/build && cp -Rp build/objects build/sdist/build/
	cd build/sdist && $(abspath $(BIN))/python -m build --no-isolation --wheel --outdir $(CURDIR)/dist

clean:
	rm -rf build dist $(VENV) *.egg-info alpkd_fast/*.so

# torch first: the build needs its headers, and pip must not pick another one for a build environment of its own.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(TORCH),$(PIP) install $(TORCH))
	$(PIP) install "setuptools>=77" numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	ALPKD_FAST_CPU=1 $(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

# alpkd-fast itself is there: pip adds what the extra names.
$(VENV)/.examples: $(VENV)/.built
	$(PIP) install "alpkd-fast[examples]"
	touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) install "alpkd-fast[dev]"
	touch $@
