"""Measures the service beside what one would pick instead: same weights, threads, client and requests."""
