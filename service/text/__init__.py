"""Text and tokens: encoding prompts, incremental decoding, stop texts, and counting tokens."""
