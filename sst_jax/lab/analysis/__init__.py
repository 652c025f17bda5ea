"""Analysis: what the approximations cost, what iterating does inside, the halting probe, and statistics of all."""
