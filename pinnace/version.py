"""The name and version of the package. pyproject.toml reads the version from here: an image has no package metadata."""

NAME = "pinnace"
__version__ = "0.1.0"
