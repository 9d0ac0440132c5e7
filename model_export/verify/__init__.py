"""Runs what was exported beside its source, and tells how far they are apart."""
