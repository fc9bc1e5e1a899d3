"""Texts of the documents that were kept in place of duplicates, for the report."""

from lightning_lm.curation.execution.entries import document_of_line
from lightning_lm.curation.execution.stages import PART, ShardTask
from lightning_lm.curation.execution.statistics import Tally, shown

__all__ = ["add_duplicates"]


def add_duplicates(tally: Tally, task: ShardTask) -> None:
    """Add the documents that were kept to the samples of their duplicates.

    Args:
        tally: Tally of the step that removed the duplicates.
        task: Task of the step.
    """
    wanted: dict[str, list[dict[str, object]]] = {}
    for samples in tally.removed.values():
        for _, sample in samples.items():
            if sample.get("duplicate_of"):
                wanted.setdefault(sample["duplicate_of"], []).append(sample)
    shards: dict[int, list[str]] = {}
    for identifier in wanted:
        shards.setdefault(int(identifier[:16], 16) * task.count >> 64, []).append(identifier)
    for index, identifiers in shards.items():
        with (task.before[index] / PART).open("rb") as file:
            for line in file:
                if any(line.startswith(b'["%s"' % identifier.encode()) for identifier in identifiers):
                    document = document_of_line(line)
                    assert document is not None
                    for sample in wanted[document.id]:
                        sample["kept"] = shown(document)
