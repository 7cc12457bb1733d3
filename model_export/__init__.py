"""Export of a torchvision classifier to the ONNX model that the server serves: `python -m model_export --help`.

It runs where torch is installed. The server never imports it; it imports the server, to verify what it wrote.
"""
