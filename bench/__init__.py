"""Measures the service beside what one would pick instead: same weights, threads, client and requests."""

import os

# Before onnxruntime is first imported: later is too late to keep it from sending telemetry.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
