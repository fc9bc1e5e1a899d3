"""Files that are written as a whole or not at all, and compared with their digests when they are read."""

from lightning_lm.storage.archives import check_archive
from lightning_lm.storage.cache import cache_folder
from lightning_lm.storage.digests import DIGESTS, SHARDED_DIGESTS, check_digests, file_state, write_digests
from lightning_lm.storage.folders import INDEX, SINGLE, TOKENIZER_FILES, filling
from lightning_lm.storage.lock import held, in_turn, lock_file, locked, remove_abandoned
from lightning_lm.storage.remembered import is_remembered, remember
from lightning_lm.storage.replacing import naming, rename, replacing, sync_folder, synced, system_error
from lightning_lm.storage.runs import (
    DEMOS,
    claim_version,
    is_first_process,
    record_run,
    resolve_checkpoint,
    run_record,
    where_from,
)
from lightning_lm.storage.switch import SWITCH, verifies
from lightning_lm.storage.temporaries import discard, remove_leftovers, temporary_for

__all__ = [
    "DEMOS",
    "DIGESTS",
    "INDEX",
    "SHARDED_DIGESTS",
    "SINGLE",
    "SWITCH",
    "TOKENIZER_FILES",
    "cache_folder",
    "check_archive",
    "check_digests",
    "claim_version",
    "discard",
    "file_state",
    "filling",
    "held",
    "in_turn",
    "is_first_process",
    "is_remembered",
    "lock_file",
    "locked",
    "naming",
    "record_run",
    "remember",
    "remove_abandoned",
    "remove_leftovers",
    "rename",
    "replacing",
    "resolve_checkpoint",
    "run_record",
    "sync_folder",
    "synced",
    "system_error",
    "temporary_for",
    "verifies",
    "where_from",
    "write_digests",
]
