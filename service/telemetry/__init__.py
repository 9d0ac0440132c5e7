"""Logs, metrics, traces, and the port that Prometheus scrapes."""
