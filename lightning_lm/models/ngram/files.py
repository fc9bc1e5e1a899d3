"""N-gram models in a folder: arrays that are mapped into memory, and digests that tell damage."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_lm.errors import CheckpointError
from lightning_lm.models.ngram.model import NgramModel, Table
from lightning_lm.storage import TOKENIZER_FILES, check_digests, filling, where_from
from lightning_lm.storage.json_text import parse_json

__all__ = ["load_ngram", "save_ngram"]

_NAME = "ngram.json"
_FORMAT = 1
_FIELDS = ("codes", "log_probs", "log_backoffs")


def save_ngram(model: NgramModel, folder: Path | str, *, files: Mapping[str, str] = {}) -> None:
    """Write a model into a folder, which no reader opens before it is complete.

    Args:
        model: The model.
        folder: Created if needed.
        files: Contents of further files by name, such as those of the tokenizer (``tokenizer.to_files()``).

    Raises:
        OSError: If it cannot be written; has the path as ``filename``.
    """
    with filling(Path(folder), known_by=(*TOKENIZER_FILES, _NAME)) as fresh:
        for name, content in files.items():
            (fresh / name).write_text(content, encoding="utf-8")
        for order, table in enumerate(model.tables, 1):
            for field in _FIELDS:
                np.save(fresh / f"{field}_{order}.npy", getattr(table, field), allow_pickle=False)
        about = {"format": _FORMAT, "order": model.order, "vocab_size": model.vocab_size}
        (fresh / _NAME).write_text(json.dumps({**about, "num_ngrams": model.num_ngrams}, indent=1), encoding="utf-8")


def load_ngram(folder: Path | str) -> NgramModel:
    """Return the model in a folder; its tables are read from the disk where they are asked for.

    Args:
        folder: As `save_ngram` wrote it.

    Raises:
        CheckpointError: If there is no model, it is damaged, or of a newer format.
    """
    folder = Path(folder)
    if not (folder / _NAME).is_file():
        raise CheckpointError(f"There is no n-gram model at {folder} (it has no {_NAME}). {where_from(folder)}")
    check_digests(folder)
    try:
        about = parse_json((folder / _NAME).read_text(encoding="utf-8"))
        if about["format"] > _FORMAT:
            raise CheckpointError(f"{folder} has format {about['format']}; this version reads {_FORMAT}. Upgrade it.")
        tables = [_read_table(folder, order) for order in range(1, about["order"] + 1)]
        model = NgramModel(tables)
        damaged = list(model.num_ngrams) != about["num_ngrams"] or model.vocab_size != about["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CheckpointError(f"The n-gram model {folder} is damaged ({error}). Make it again.") from error
    if damaged:
        raise CheckpointError(f"The n-gram model {folder} is damaged: its tables are not those of {_NAME}.")
    return model


def _read_table(folder: Path, order: int) -> Table:
    fields = [np.load(folder / f"{field}_{order}.npy", mmap_mode="r", allow_pickle=False) for field in _FIELDS]
    if [field.dtype for field in fields] != [np.int64, np.float64, np.float64] or len({f.shape for f in fields}) != 1:
        raise ValueError(f"tables of order {order} are not of one size and the known types")
    return Table(*map(np.asarray, fields))
