"""Measures the service beside llama.cpp and onnxruntime-genai: same weights, threads, client and requests."""

import os

# onnxruntime reads this when it is first imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
