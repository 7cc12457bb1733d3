"""An example picture, and a V1 request with it, to try the server with."""
