"""Graphs that mobius-onnx builds, brought into the service's form."""
