"""What is given to be exported: read and checked, GGUF files and Hugging Face directories alike."""
