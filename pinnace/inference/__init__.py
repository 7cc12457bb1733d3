"""Inference: the path of a request from its encoded form to its encoded response, whatever transport it came by."""
