"""Hugging Face directories, and the hub that they are downloaded from."""
