"""Data: data sets, row and prompt formats, problems, tokenizers, packed sequences, resumable iterators."""
