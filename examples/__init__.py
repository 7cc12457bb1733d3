"""A picture and a request of our own to try the server with."""
