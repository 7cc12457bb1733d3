"""The gRPC wire: grpc_predict_v2.proto, the messages generated from it, and the decoder that reads them."""
