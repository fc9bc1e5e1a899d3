"""``python -m lightning_lm.cli``: the command for launchers that start a module, such as ``torchrun -m``."""

import sys

from lightning_lm.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
