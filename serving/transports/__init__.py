"""REST and gRPC: bytes into requests and responses into bytes. What a request means is decided below."""
