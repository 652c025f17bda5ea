"""Data: problems, prompt formats, tokenizers, packed sequences, resumable iterators."""
