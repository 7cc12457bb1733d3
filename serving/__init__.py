"""A model server for KServe's REST and gRPC protocols. app.py, beside this package, runs it."""

NAME = "serving"
__version__ = "0.1.0"
