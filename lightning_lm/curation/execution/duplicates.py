"""Texts of the clusters of duplicates, for the report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lm.curation.execution.entries import document_of_line
from lightning_lm.curation.execution.stages import PART, ShardTask, load_arrays
from lightning_lm.curation.execution.statistics import Tally, shown

__all__ = ["add_duplicates"]

_COPIES = 4
"""Removed copies that are shown beside one that was removed."""


def add_duplicates(tally: Tally, task: ShardTask) -> None:
    """Add to the samples of duplicates the document that was kept, and other copies of it with their number.

    Args:
        tally: Tally of the step that removed the duplicates.
        task: Task of the step.
    """
    samples = [
        (identifier, sample)
        for smallest in tally.removed.values()
        for identifier, sample in smallest.items()
        if sample.get("duplicate_of")
    ]
    if not samples:
        return
    clusters = _clusters(task.decision, {sample["duplicate_of"] for _, sample in samples})
    shown_copies = {
        identifier: [other for other in clusters.get(sample["duplicate_of"], []) if other != identifier][:_COPIES]
        for identifier, sample in samples
    }
    wanted = {sample["duplicate_of"] for _, sample in samples}.union(*shown_copies.values())
    texts = _texts(task, wanted)
    for identifier, sample in samples:
        sample["kept"] = {"id": sample["duplicate_of"], **texts[sample["duplicate_of"]]}
        sample["copies"] = [{"id": other, **texts[other]} for other in shown_copies[identifier]]
        sample["num_copies"] = max(1, len(clusters.get(sample["duplicate_of"], [])))


def _clusters(decision: Path | None, kept: Iterable[str]) -> dict[str, list[str]]:
    """Return the sorted ids of the copies that were removed in place of each of some documents."""
    arrays = {} if decision is None else load_arrays(decision)
    if not {"removed", "kept"} <= arrays.keys():
        return {}
    rows = {identifier: np.flatnonzero(arrays["kept"] == identifier.encode()) for identifier in kept}
    return {identifier: [name.decode() for name in arrays["removed"][places]] for identifier, places in rows.items()}


def _texts(task: ShardTask, identifiers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return documents of the stage before by id, as a report shows them."""
    shards: dict[int, set[bytes]] = {}
    for identifier in identifiers:
        shards.setdefault(int(identifier[:16], 16) * task.count >> 64, set()).add(identifier.encode())
    found = {}
    for index, wanted in shards.items():
        with (task.before[index] / PART).open("rb") as file:
            for line in file:
                if line[2 : line.index(b'"', 2)] in wanted:
                    document = document_of_line(line)
                    assert document is not None
                    found[document.id] = shown(document)
    return found
