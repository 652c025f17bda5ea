"""Serving: a queue with continuous batching, and the OpenAI-compatible routes in front of it."""
