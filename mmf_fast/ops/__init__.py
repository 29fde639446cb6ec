"""Hot operations of a JVP step, each with a plain PyTorch reference."""
