"""The model as onnxruntime runs it: all that knows onnxruntime."""
