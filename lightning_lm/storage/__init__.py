"""Files that are written as a whole or not at all, and compared with their digests when they are read."""

from lightning_lm.storage.archives import check_archive
from lightning_lm.storage.digests import DIGESTS, check_digests, file_state, write_digests
from lightning_lm.storage.folders import INDEX, SINGLE, TOKENIZER_FILES, filling
from lightning_lm.storage.remembered import is_remembered, remember
from lightning_lm.storage.replacing import naming, replacing, sync_folder, system_error
from lightning_lm.storage.switch import SWITCH, verifies
from lightning_lm.storage.temporaries import discard, remove_leftovers, temporary_for

__all__ = [
    "DIGESTS",
    "INDEX",
    "SINGLE",
    "SWITCH",
    "TOKENIZER_FILES",
    "check_archive",
    "check_digests",
    "discard",
    "file_state",
    "filling",
    "is_remembered",
    "naming",
    "remember",
    "remove_leftovers",
    "replacing",
    "sync_folder",
    "system_error",
    "temporary_for",
    "verifies",
    "write_digests",
]
