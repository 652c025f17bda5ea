"""Storages of frozen linears: their interface, NF4, and the registry."""
