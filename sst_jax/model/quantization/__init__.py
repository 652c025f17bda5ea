"""How frozen linears are stored and read."""
