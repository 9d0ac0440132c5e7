"""Graphs of the families that the exporter builds by itself."""
