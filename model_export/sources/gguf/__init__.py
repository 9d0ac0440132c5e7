"""GGUF files: header, metadata, configuration, tokenizer, weights."""
