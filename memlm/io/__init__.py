"""Model files: safetensors, Hugging Face folders, GGUF, tokenizers."""
