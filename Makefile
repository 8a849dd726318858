# Every target sets up what it needs, so any of them works in a fresh clone.

PYTHON ?= python3
PORT ?= 50051
ARGS ?=
JOBS ?= 2
PEERS ?=
BUF_VERSION := 1.75.0
CHROMIUM_VERSION := 153.0.0

BIN := .venv/bin
PROTO_BIN := .venv-protos/bin
SETUP := .venv/.complete
BENCH_SETUP := .venv/.bench-complete
PROTO_SETUP := .venv-protos/.complete
DOCS_BIN := .venv-docs/bin
DOCS_SETUP := .venv-docs/.complete
BUF := .cache/buf-$(BUF_VERSION)/node_modules/.bin/buf
CHROMIUM := .cache/chromium-$(CHROMIUM_VERSION)/chromium
MODEL := .cache/models/SmolLM2-135M-Instruct
CODE := server client tests benchmarks examples

# Its package has a browser for this platform alone; elsewhere the tests take an installed one.
ifeq ($(shell uname -sm) $(notdir $(shell command -v npm)),Linux x86_64 npm)
BROWSER := $(CHROMIUM)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo run test check docs protos model browser clean
.PHONY: bench bench-engine bench-cold-start bench-recovery bench-turmoil bench-simulation
.PHONY: bench-peers
.PHONY: check-style check-types check-protos check-stubs

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## Make .venv with everything for running and developing

demo: $(SETUP) $(MODEL) ## From an empty cache to an answer: a hub, a daemon, a model, a question
	@$(BIN)/python -m examples.demo.demo

run: $(SETUP) ## Run the daemon (PORT=50051, ARGS="more options")
	$(BIN)/loaderd --port $(PORT) $(ARGS)

test: $(SETUP) $(MODEL) $(BROWSER) ## Run the tests (ARGS="tests/unit -k name", JOBS=0: in one process)
	$(BIN)/pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

check: check-style check-types check-protos check-stubs docs ## Style, types, wire contract, stubs, docs

docs: $(DOCS_SETUP) ## Build the pages of the documentation (into .cache/site)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --quiet

protos: $(PROTO_SETUP) ## Generate the stubs from protos/**/*.proto
	$(call generate,protos)

model: $(MODEL) ## Build the demo model (fetches a 100 MB package once)

browser: $(BROWSER) ## Fetch the browser of the status page's tests (a 70 MB package, once)

bench: $(SETUP) $(MODEL) ## Run the benchmarks (ARGS="options")
	$(BIN)/python -m benchmarks $(ARGS)

bench-engine: $(SETUP) $(MODEL) ## What the engine promises, each figure beside its bar (ARGS="options")
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-cold-start: $(SETUP) $(MODEL) ## Loads with a warm standby beside new Python processes (ARGS="options")
	$(BIN)/python -m benchmarks.cold_start --model $(MODEL) $(ARGS)

bench-recovery: $(SETUP) $(MODEL) ## How soon streams end and models are back when workers are killed
	$(BIN)/python -m benchmarks.recovery --model $(MODEL) $(ARGS)

bench-turmoil: $(SETUP) $(MODEL) ## Models beside each other while clients unload and kill (ARGS="options")
	$(BIN)/python -m benchmarks.turmoil --model $(MODEL) $(ARGS)

bench-simulation: $(SETUP) ## 100,000 events on simulated boxes (ARGS="options")
	$(BIN)/python -m benchmarks.simulation --events 100000 $(ARGS)

bench-peers: $(BENCH_SETUP) $(MODEL) ## Beside other servers (PEERS="transformers vllm llama" installs them)
	$(BIN)/python -m benchmarks.peers $(PEERS) $(ARGS)

clean: ## Remove everything that make made: environments, model, caches
	rm -rf .venv .venv-protos .venv-docs .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(wildcard $(CODE)) protos -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(BENCH_SETUP): $(SETUP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

$(MODEL): | $(SETUP)
	$(BIN)/python examples/demo/model.py $@

check-style: $(SETUP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: $(SETUP)
	$(BIN)/mypy $(wildcard $(CODE))

ifneq ($(shell command -v npm),)
check-protos: $(BUF)
	$(BUF) lint protos
else
check-protos:
	@echo "buf lint: skipped, because npm is not installed here"
endif

$(BUF):
	npm install --loglevel=error --no-save --prefix .cache/buf-$(BUF_VERSION) @bufbuild/buf@$(BUF_VERSION)

# Where it cannot be fetched, the tests that need it are skipped and say so.
$(CHROMIUM):
	timeout 180 npm install --loglevel=error --no-save --ignore-scripts --fetch-retries=1 --prefix $(@D) \
	    @sparticuz/chromium@$(CHROMIUM_VERSION) \
	  && cd $(@D) && $(call unbrotli,al2023.tar) | tar -x && $(call unbrotli,fonts.tar) | tar -x \
	  && $(call unbrotli,chromium) > unpacked && chmod +x unpacked \
	  && rm -r node_modules && mv unpacked $(@F) \
	  || echo "there is no browser for the tests: its package could not be fetched or unpacked"

# The committed stubs must be what the generator makes of the .proto files today.
check-stubs: $(PROTO_SETUP)
	rm -rf .cache/stubs
	mkdir -p .cache/stubs
	$(call generate,.cache/stubs)
	diff -ru --exclude='*.proto' --exclude=py.typed --exclude=__pycache__ .cache/stubs/loaderd protos/loaderd \
	  || { echo "the stubs are not those of the .proto files: run 'make protos' and commit"; exit 1; }

$(PROTO_SETUP): protos/requirements.txt
	test -x $(PROTO_BIN)/python || $(PYTHON) -m venv .venv-protos
	$(PROTO_BIN)/python -m pip install --quiet -r protos/requirements.txt
	@touch $@

$(DOCS_SETUP): docs/site/requirements.txt
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip install --quiet -r docs/site/requirements.txt
	@touch $@

# $(call generate,FOLDER): the stubs of all .proto files, below FOLDER.
define generate
$(PROTO_BIN)/python -m grpc_tools.protoc -I protos \
  --plugin=protoc-gen-mypy=$(PROTO_BIN)/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=$(PROTO_BIN)/protoc-gen-mypy_grpc \
  --python_out=$(1) --grpc_python_out=$(1) \
  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
  $(shell find protos/loaderd -name '*.proto' | sort)
endef

# $(call unbrotli,NAME): the file NAME.br of the browser's package, unpacked.
unbrotli = node -e 'process.stdin.pipe(zlib.createBrotliDecompress()).pipe(process.stdout)' \
  < node_modules/@sparticuz/chromium/bin/$(1).br
