"""Residual streams: how a layer's branches read from the stream and write back to it."""
