"""What is served, and in how much memory: models, their plans for host and GPU."""
