"""Measures the server beside what the same cores can do without one: `make bench`."""
