"""The folder of the output: its files, the report, and the manifest that names what training reads."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lm.curation.execution.job import Outcome
from lightning_lm.curation.execution.stages import PART, REMOVED
from lightning_lm.curation.report.page import report_page
from lightning_lm.curation.report.report import NAME, Report, StepReport
from lightning_lm.data.paths import MANIFEST
from lightning_lm.errors import CheckpointError, ConfigurationError, DataError
from lightning_lm.storage import discard, rename, write_digests
from lightning_lm.storage.json_text import parse_json

__all__ = ["HIDDEN", "digest_of", "find_output", "write_output"]

HIDDEN = ".removed"
"""Folder of the removed documents, which readers of a corpus pass over."""


def find_output(output: Path, digest: str | None, *, overwrite: bool) -> Report | None:
    """Return the report of an output that is complete; None if it has to be written.

    Args:
        output: Folder of the output.
        digest: Digest of input and steps; ``None`` if it is not known yet.
        overwrite: Accept that an output of something else is replaced.

    Raises:
        ConfigurationError: If there is something else, which is not to be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        manifest = parse_json((output / MANIFEST).read_text(encoding="utf-8"))
        files = {file["filename"]: file["bytes"] for file in manifest["curated_files"]}
        found = manifest["digest"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigurationError(
            f"{output} exists and is no output of a curation. Choose another output folder, or remove it."
        ) from None
    if digest is None or (overwrite and found != digest):
        return None
    if found != digest:
        raise ConfigurationError(
            f"{output} has the output of another input or of other steps. Choose another output folder, or add "
            "--overwrite (overwrite=True)."
        )
    whole = all((output / name).is_file() and (output / name).stat().st_size == size for name, size in files.items())
    try:
        return Report.read(output) if whole and (output / NAME).is_file() else None
    except (CheckpointError, DataError):  # damaged, so all is written again
        return None


def write_output(output: Path, work: Path, digest: str, steps: Sequence[Any], outcome: Outcome) -> Report:
    """Put the output together beside its place and move it there.

    Args:
        output: Folder of the output.
        work: Folder of the intermediate results.
        digest: Digest of input and steps.
        steps: The steps.
        outcome: Results of the run.
    """
    fresh = work / "output"
    discard(fresh)
    (fresh / HIDDEN).mkdir(parents=True)
    files = []
    for index, part in enumerate(outcome.parts):
        name = f"part-{index:05d}.jsonl"
        if part.documents:
            _link(part.folder / PART, fresh / name)
            size = (fresh / name).stat().st_size
            files.append({"filename": name, "documents": part.documents, "bytes": size, "sha256": part.digest})
        if (part.folder / REMOVED).stat().st_size:
            _link(part.folder / REMOVED, fresh / HIDDEN / name)
    report = Report(
        folder=output,
        documents_read=outcome.documents_read,
        bytes_read=outcome.bytes_read,
        documents_kept=sum(part.documents for part in outcome.parts),
        bytes_kept=outcome.bytes_kept,
        steps=[
            StepReport.of(name, step, tally) for step, (name, tally) in zip(steps, outcome.tallies.items(), strict=True)
        ],
        unreadable=dict(sorted(outcome.unreadable.items(), key=lambda item: (-item[1], item[0]))),
        examples={reason: [list(example) for example in sorted(found)] for reason, found in outcome.examples.items()},
        files=[str(file["filename"]) for file in files],
    )
    manifest = {"digest": digest, "curated_files": files}
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (fresh / NAME).write_text(report.to_json(), encoding="utf-8", errors="replace")
    (fresh / "report.html").write_text(report_page(report), encoding="utf-8", errors="replace")
    write_digests(fresh, [MANIFEST, NAME, *report.files])
    if output.exists():
        output.rename(work / f"replaced.{os.getpid()}")
    rename(fresh, output)
    return report


def digest_of(text: str) -> str:
    """Return the digest of a fingerprint.

    Args:
        text: The fingerprint.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
