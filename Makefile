# `make demo` and `make test` work on a fresh machine with Python >= 3.11 and nothing else; the rest is for developers.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
CLUSTER ?= /tmp/cvft-cluster
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo cluster cluster-stop test test-cluster test-objectstore test-monitoring test-tensorflow test-timm test-triton test-serving check bench bench-peers help clean-demo

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: $(VENV)/.runtime  ## raw images -> shards -> training -> registered model -> report, on a synthetic town
	@$(BIN)/python -m jobs.demo --out $(DEMO)

# In two processes of one thread each: whole files go to either, all that needs Ray to one (see tests/conftest.py).
test: $(VENV)/.developer  ## the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not cluster" --ignore tests/objectstore --ignore tests/monitoring -n 2 --dist loadgroup

test-objectstore: $(VENV)/.developer  ## a real object store, Ceph's, and MLflow on PostgreSQL (Debian's packages: see the message)
	@infra/objectstore/radosgw.sh check
	@PYTHON=$(BIN)/python infra/mlflow/server.sh check
	@$(BIN)/python -m pytest tests/objectstore

test-cluster: $(VENV)/.developer  ## whole searches and submissions on Ray: minutes that `make test` is spared
	@$(BIN)/python -m pytest -m cluster tests/jobs

test-monitoring: $(VENV)/.developer  ## the dashboard's expressions asked of a real Prometheus (Debian's package) that scrapes a Ray at work
	@command -v prometheus >/dev/null || { echo "prometheus is missing: apt-get install --no-install-recommends prometheus" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/monitoring

check: $(VENV)/.developer  ## format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/.developer bench-peers  ## speed and memory beside the peers; each script exits non-zero when it misses its target
	@missed=0; for script in tests/bench/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || missed=1; done; exit $$missed

bench-peers: .venv-peers/.installed  ## what ours is compared with, in an environment of its own

test-tensorflow: .venv-tensorflow/.installed  ## import of the authors' checkpoint, with a real TensorFlow
	@.venv-tensorflow/bin/python -m pytest --noconftest tests/pipeline/test_official_import.py

test-timm: .venv-timm/.installed  ## trunks of timm, beside a torchvision that fits its torch
	@.venv-timm/bin/python -m pytest --noconftest tests/cvft/test_timm_backbone.py

test-triton: $(VENV)/.developer .venv-triton/.installed  ## the fused kernel in Triton's interpreter (no GPU needed)
	@PYTHONPATH=.venv-triton $(BIN)/python -m pytest tests/cvft/test_kernels.py

# Ray, the store and MLflow are told apart by their folder, and ended by the numbers of their processes.
cluster: $(VENV)/.developer  ## one machine that behaves as many: Ray with an autoscaler, an object store and MLflow, in CLUSTER
	@infra/local/cluster.sh start $(CLUSTER)

cluster-stop:  ## end it, and forget what it holds
	@infra/local/cluster.sh stop $(CLUSTER)
	rm -rf $(CLUSTER)

test-serving: $(VENV)/.developer .venv-serving/.installed  ## a registered model where only what it asks for is installed
	@CVFT_SERVING_PYTHON=$(CURDIR)/.venv-serving/bin/python $(BIN)/python -m pytest tests/serving

clean-demo:  ## forget the demo's data, runs and models
	rm -rf $(DEMO)

# torch first and pinned: whatever asks for an unpinned torch later finds it there.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed; say which: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) (up to 2.9 GB, a few minutes the first time)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

.venv-tensorflow/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv-tensorflow (TensorFlow is 1.3 GB)" >&2
	@test -x .venv-tensorflow/bin/python || $(PYTHON) -m venv .venv-tensorflow
	@.venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	@.venv-tensorflow/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt safetensors tensorflow-cpu pytest pytest-timeout
	@touch $@

# A torch of its own: torchvision imports beside the very build of torch that it was made for, and only there.
.venv-timm/.installed: pyproject.toml
	@echo "installing into .venv-timm (5 GB)" >&2
	@test -x .venv-timm/bin/python || $(PYTHON) -m venv .venv-timm
	@.venv-timm/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv-timm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	@.venv-timm/bin/python -m pip install --quiet --disable-pip-version-check timm==1.0.31 numpy safetensors pytest pytest-timeout
	@touch $@

# litdata and mosaicml-streaming ask for torchvision and the SDKs of four clouds: they go in last and without
# what they ask for; what they import stands here by name.
.venv-peers/.installed: constraints.txt
	@echo "installing into .venv-peers (1.4 GB)" >&2
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpy webdataset simplejpeg \
		faiss-cpu scikit-learn \
		opencv-python-headless pillow boto3 filelock requests tqdm xxhash \
		lightning-utilities tifffile obstore 'transformers<5' catalogue Brotli python-snappy zstd
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0
	@touch $@

# Beside the venv and not in it: 0.7 GB that nothing but these tests needs on a machine without CUDA.
.venv-triton/.installed: constraints.txt | $(VENV)/.runtime
	@echo "installing into .venv-triton (Triton is 0.7 GB)" >&2
	@$(PIP) --no-deps --target .venv-triton triton
	@touch $@

# What a model made here asks for, and nothing else; every version in it is pinned.
.venv-serving/.installed: constraints.txt pipeline/tracking/registry.py | $(VENV)/.runtime
	@echo "installing into .venv-serving (1.5 GB)" >&2
	@test -x .venv-serving/bin/python || $(PYTHON) -m venv .venv-serving
	@$(BIN)/python -c 'from pipeline.tracking.registry import serving_requirements as r; print(*r(), sep="\n")' > .venv-serving/requirements.txt
	@.venv-serving/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-serving/requirements.txt
	@touch $@

$(VENV)/.developer: $(VENV)/.runtime
	@$(PIP) --group test --group check
	@touch $@
