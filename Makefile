# Each target sets up what it needs in .venv, from pyproject.toml and constraints.txt, and says so.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DEMO := .venv/demo-ready
PEERS := .venv/peers
# Three processes for two cores: tests wait for servers, clusters and processes that they start.
TESTS := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=12
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export LORA_EMBED_CACHE ?= $(CURDIR)/.cache
# By itself: its metadata ask for older packages than the rest.
DAFT := $(LORA_EMBED_CACHE)/peers/daft/ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo first-search test quick-tests test-slow test-long soak readers matrix families errors mistakes processors versions shards faults lint policy hashes strangers bench quality map wheel clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (torch, transformers, ray …): a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[demo,test,evaluation,indexes]'
	@touch $(DEMO) $(READY)

demo: $(DEMO)
	@$(BIN)/lora-embed demo demo-run

$(DEMO): pyproject.toml constraints.txt
	@echo "Setting up .venv for the demo (torch, transformers, ray …): a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[demo]'
	@touch $(DEMO)

first-search: setup
	$(BIN)/python campaigns/first_search.py $(FIRST)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

policy: setup
	$(PYTHON) -m venv $(LORA_EMBED_CACHE)/policy
	$(LORA_EMBED_CACHE)/policy/bin/pip install --quiet --disable-pip-version-check checkov==3.3.30
	$(BIN)/python campaigns/policy.py $(LORA_EMBED_CACHE)/policy/bin/checkov

hashes: setup
	$(BIN)/python scripts/hash_archives.py

strangers: setup
	$(BIN)/python campaigns/hostile_tables.py $(STRANGERS)
	$(BIN)/python campaigns/hostile_encoders.py $(STRANGERS)
	$(BIN)/python campaigns/strangers.py $(STRANGERS)

test: setup
	@$(MAKE) --no-print-directory --jobs 2 lint quick-tests

quick-tests: setup
	$(TESTS) -m 'not slow and not long'

test-slow: setup
	$(TESTS) -m 'slow and not long'

test-long: setup
	$(BIN)/python -m pytest --durations=12 -m long -s

soak: setup
	$(BIN)/python campaigns/soak.py --minutes 60 $(SOAK)

readers: setup
	$(BIN)/python campaigns/readers.py --minutes 10 $(READERS)

matrix: setup
	LORA_EMBED_WRITE_DOCS=1 $(BIN)/python -m pytest tests/model/test_features.py

families: setup
	$(BIN)/python campaigns/families.py --repeat 10 --processes 2 --write $(FAMILIES)

errors: setup
	LORA_EMBED_WRITE_DOCS=1 $(BIN)/python -m pytest tests/test_errors.py tests/model/test_refusals.py

mistakes: setup
	$(BIN)/python campaigns/mistakes.py --write
	$(BIN)/python campaigns/wrong_files.py $(MISTAKES)

processors: setup
	$(BIN)/python tests/processors.py $(PROCESSORS)

versions: setup
	$(BIN)/python campaigns/environments.py $(VERSIONS)

shards: setup
	$(BIN)/python campaigns/hostile_shards.py --count 20000 $(SHARDS)

faults: setup
	$(BIN)/python campaigns/campaign.py $(FAULTS)

bench: $(PEERS) $(DAFT)
	$(BIN)/python benchmarks/bench.py $(BENCH)

$(PEERS): $(READY)
	$(PIP) --constraint constraints.txt --editable '.[demo,test,evaluation,indexes,bench]'
	@touch $@

$(DAFT): $(READY)
	$(PIP) --no-deps --target $(dir $@) daft==0.7.26
	@touch $@

quality: setup
	$(BIN)/python benchmarks/quality.py

map: setup
	$(BIN)/python scripts/draw_architecture.py

wheel: setup
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

clean:
	rm -rf dist demo-run .cache .mypy_cache .ruff_cache
