"""Text and tokens: encoding prompts, decoding tokens as they come, and finding stop texts."""
