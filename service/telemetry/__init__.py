"""What the service tells about itself: logs, metrics, traces, and the port that Prometheus reads."""
