"""``python -m lightning_lm``: the ``lightning-lm`` command where scripts are not on the path."""

import sys

from lightning_lm.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
