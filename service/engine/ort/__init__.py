"""Runs the model on onnxruntime. No other package of the service imports onnxruntime."""
