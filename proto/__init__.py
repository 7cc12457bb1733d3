"""Protocol buffers: the .proto files, and the tool that generates pinnace/proto/generated from them."""
