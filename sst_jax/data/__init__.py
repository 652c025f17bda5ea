"""Data: problems, prompts, tokenizers, packed rows, resumable iterators."""
