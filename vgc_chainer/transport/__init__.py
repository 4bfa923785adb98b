"""Bytes in, bytes out: how packed messages reach all ranks. Knows nothing of gradients."""
