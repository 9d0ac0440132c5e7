"""Turns weights, a GGUF file's or a Hugging Face directory's, into a model directory for the service."""

import os

# Before onnxruntime is first imported: later is too late to keep it from sending telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
