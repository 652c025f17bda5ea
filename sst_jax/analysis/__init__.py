"""Analysis: what the approximations cost, and figures of it."""
