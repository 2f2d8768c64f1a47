"""The version of hybridlm, at the bottom of the package order so that every file may read it."""

__version__ = "0.2.0"
