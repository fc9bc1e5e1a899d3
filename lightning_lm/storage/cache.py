"""The user's cache folder: tokenizers, token stores, tuned kernels, digests that were compared."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(path: str | None = None) -> Path:
    """Return the folder of the cache.

    Args:
        path: Folder that the user chose; by default ``lightning-lm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if path is not None:
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-lm"
