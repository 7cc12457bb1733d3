"""The HTTP port: REST V1 and V2, the page and the API documentation, probes, and gRPC for platforms with one port."""
