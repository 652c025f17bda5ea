"""The laboratory: evaluation, analysis, probing, studies and planning. It imports the library, never the reverse."""
