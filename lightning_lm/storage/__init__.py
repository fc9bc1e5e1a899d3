"""Files that are written as a whole or not at all, and compared with their digests when they are read."""

from lightning_lm.storage.archives import check_archive
from lightning_lm.storage.replacing import naming, replacing, sync_folder, system_error
from lightning_lm.storage.switch import SWITCH, verifies
from lightning_lm.storage.temporaries import discard, remove_leftovers, temporary_for

__all__ = [
    "SWITCH",
    "check_archive",
    "discard",
    "naming",
    "remove_leftovers",
    "replacing",
    "sync_folder",
    "system_error",
    "temporary_for",
    "verifies",
]
