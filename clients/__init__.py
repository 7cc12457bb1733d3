"""Command-line clients of the server, small enough to copy."""
