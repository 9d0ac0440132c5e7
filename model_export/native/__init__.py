"""Builds the graphs of the Llama-like families, without torch."""
