"""The attention operator in Triton: none yet, the reference serves CUDA."""

forward = backward = None
