"""Language models with a stock PyTorch Lightning ``Trainer``: from raw text to an aligned model.

Importing this package loads neither Lightning nor Triton and changes nothing in the world. Every part lives in a
sub-package: ``modules``, ``models``, ``datamodules``, ``callbacks``, ``strategies``, ``optim``, ``tokenizers``, ...
"""

from pathlib import Path

__all__ = ["__version__"]
__version__ = "0.1.0"

# In a checkout `callbacks/`, `strategies/` and `recipes/` lie beside this folder, where users browse them. An installed
# copy has them inside. This makes the checkout importable without an installation, and does nothing elsewhere.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "callbacks" / "__init__.py").is_file():
    __path__.append(str(_checkout))
