# make demo   set up, build, and run the main job on the shipped model
# make test   set up and pass the tests
# make lint   what `make test` checks first
#
# Everything lives in .venv and build/; both are kept and reused.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
ORT_OLD := $(VENV)/onnxruntime-1.21

# The CPU build of torch, pinned, and installed before anything that names torch: a plain `torch` would bring several GB
# of CUDA libraries to a host that cannot use them.
TORCH := 2.13.0
TORCHVISION := 0.28.0

NATIVE := CMakeLists.txt $(shell find cmake kernels plugins -type f 2>/dev/null)

.PHONY: setup demo test lint format test-gpu clean

setup: $(VENV)/.built

$(VENV)/.deps: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q 'torch==$(TORCH)+cpu' || $(BIN)/python -m pip install -q 'torch==$(TORCH)'
	$(BIN)/python -m pip install -q onnxruntime safetensors \
	  $$($(BIN)/python cmake/requirements.py dependencies test lint build)
	@# Hosts these have no wheels for skip the tests that need them.
	$(BIN)/python -m pip install -q $$($(BIN)/python cmake/requirements.py runtimes) \
	  || echo 'TensorRT-RTX and the lean runtime are not to be had here: their tests will be skipped'
	@# Carries TensorRT 10's headers; its own dependencies are of no use here.
	$(BIN)/python -m pip install -q --no-deps kernel-lens==2.0.1 \
	  || echo 'kernel-lens is not to be had here: the TensorRT adapters will not be compiled'
	@# The DeiT that `vimdeploy bench` compares with. torchvision is what timm imports, and of it only Python is used.
	$(BIN)/python -m pip install -q --no-deps timm torchvision==$(TORCHVISION) \
	  || echo 'timm or torchvision $(TORCHVISION) is not to be had here: the tests of the DeiT baselines will be skipped'
	@# The oldest ONNX Runtime the library supports, beside the newest; Pythons without a wheel of it skip its tests.
	$(BIN)/python -m pip install -q --no-deps --target $(ORT_OLD) onnxruntime==1.21.0 || rm -rf $(ORT_OLD)
	touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cc' '*.cu' '*.cuh' '*.cpp')

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cc' '*.cu' '*.cuh' '*.cpp')

# One thread a worker: two workers with torch's usual threads would stand in each other's way.
test: setup lint
	OMP_NUM_THREADS=1 VIMDEPLOY_ORT_OLD=$(CURDIR)/$(ORT_OLD) $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-gpu:
	bash tests/gpu/run.sh

clean:
	rm -rf build $(VENV) vimdeploy/_lib
