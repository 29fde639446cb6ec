"""Package build; the metadata is in pyproject.toml.

The package is pure Python: it installs as an ordinary wheel, without a compiler and without a GPU.
"""

from glob import glob

from setuptools import setup

setup(data_files=[("share/mmf_fast/configs", sorted(glob("configs/*.yaml") + glob("configs/*.json")))])
