"""Weights in and out: key tables, Hugging Face safetensors, GGUF, base folders, LoRA merging, exports, the hub."""
