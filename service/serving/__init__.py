"""Loads the models to serve, and plans their memory on host and GPU."""
