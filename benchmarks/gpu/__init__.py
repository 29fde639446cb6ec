"""The first day on a GPU, by one command: python -m benchmarks.gpu (make gpu). __main__.py says how."""

PARTS = ("tests", "tiles", "kernels", "steps", "imagenet", "profile")
