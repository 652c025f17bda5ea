"""Weights in and out: name tables, Hugging Face safetensors, GGUF, base folders, LoRA merging."""
