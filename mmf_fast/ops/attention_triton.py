"""The attention operator in Triton."""
forward = backward = None
