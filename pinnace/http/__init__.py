"""REST and gRPC: bytes into requests and responses into bytes. What a request means is decided below."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before anybody imports grpc: its C core would log beside us
