"""Command lines that call the server, small enough to copy."""
