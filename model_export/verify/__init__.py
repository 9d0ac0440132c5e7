"""Runs the exported model and its source on one text and measures how far apart they are."""
