"""The gRPC port and its services: inference, health and reflection."""
