"""Serving: an engine with continuous batching, and the OpenAI-compatible routes in front of it."""
