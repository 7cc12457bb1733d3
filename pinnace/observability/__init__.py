"""Observability: logs, metrics, timings and the access log."""
