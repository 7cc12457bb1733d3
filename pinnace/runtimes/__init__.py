"""Runtimes: what runs a model, ONNX Runtime in this process or replicas of Ray Serve."""
