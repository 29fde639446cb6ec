"""python -m mmf_fast COMMAND ...: see cli.py."""

import sys

from mmf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
