"""Turns a torchvision classifier into the ONNX model that the server serves: `python -m model_export --help`.

Runs where torch is installed; the server never imports it. It imports the server, to check what it wrote.
"""
