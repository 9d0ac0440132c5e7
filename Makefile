VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: stubs
stubs: ## Regenerates the Python stubs and Envoy's descriptor from proto/.
	$(PYTHON) -m grpc_tools.protoc -Iproto -Iproto/third_party \
	  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
	  --python_out=proto --grpc_python_out=proto --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto \
	  completion/v1/completion.proto
	$(PYTHON) envoy/descriptor.py
