"""Runs that others have made: tables of CSV or JSON as records of a ledger."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_lm.errors import DataError
from lightning_lm.scaling.fits.points import FLOPS_PER_PARAMETER_TOKEN
from lightning_lm.scaling.flop_conventions import check_convention
from lightning_lm.scaling.ledger import RunRecord
from lightning_lm.storage.json_text import parse_json

__all__ = ["import_runs"]

_SUFFIXES = (".csv", ".json", ".jsonl")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "parameters": ("parameters", "params", "n", "model_size", "num_params", "n_params", "model size"),
    "tokens": ("tokens", "d", "training_tokens", "training tokens", "num_tokens", "n_tokens"),
    "flops": ("flops", "c", "compute", "compute_budget", "training_flop", "training flop", "training_flops"),
    "loss": ("loss", "l", "final_loss", "val_loss", "val/loss", "nll"),
    "unique_tokens": ("unique_tokens", "u", "unique tokens"),
}
"""Names of the columns in other programs, in lower case."""


def import_runs(path: Path | str, *, convention: str = "total", encoding: str = "utf-8") -> list[RunRecord]:
    """Read runs from ``.csv``, ``.json`` (a list of objects) or ``.jsonl``.

    Of parameters, tokens and FLOPs two are enough, as ``C = 6ND``. All other columns become hyper-parameters.

    Args:
        path: The file.
        convention: Convention of its parameter counts; they can be compared with runs in that convention alone.
        encoding: Encoding of the file.

    Raises:
        DataError: If the file cannot be read, or a row lacks a number; the row is named.
    """
    path = Path(path)
    check_convention(convention)
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is no table that can be read; save it as {', '.join(_SUFFIXES)}.")
    try:
        text = path.read_text(encoding=encoding).removeprefix("\ufeff")  # Excel writes a byte-order mark
        rows = list(_rows(path, text))
    except FileNotFoundError as error:
        raise DataError(f"There is no table at {path}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a table of runs: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no run.")
    return [_record(row, f"{path.name}, row {number}", convention) for number, row in enumerate(rows, start=1)]


def _rows(path: Path, text: str) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".csv":
        lines = text.splitlines()
        header = lines[0] if lines else ""
        return csv.DictReader(lines, delimiter=max(",;\t", key=header.count))  # Excel writes ; in many countries
    if path.suffix == ".jsonl":
        return [parse_json(line) for line in text.splitlines() if line.strip()]
    data = parse_json(text)
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError("a .json file must hold a list of objects")
    return data


def _record(row: Mapping[str, Any], place: str, convention: str) -> RunRecord:
    known, used = {}, set()
    for name, spellings in _NAMES.items():
        column = next((key for key in row if key is not None and key.strip().lower() in spellings), None)
        if column is not None and row[column] not in (None, ""):
            known[name] = _number(row[column], f"{place}, column {column}")
            used.add(column)
    size, tokens, flops = (known.get(name) for name in ("parameters", "tokens", "flops"))
    if "loss" not in known or (size, tokens, flops).count(None) > 1:
        raise DataError(
            f"{place} has columns {', '.join(map(str, row))}; needed are the loss and two of parameters, tokens, FLOPs."
        )
    size = size or (flops or 0) / FLOPS_PER_PARAMETER_TOKEN / (tokens or 1)
    tokens = tokens or (flops or 0) / FLOPS_PER_PARAMETER_TOKEN / size
    return RunRecord(
        parameters={convention: size},
        flops_per_token={convention: FLOPS_PER_PARAMETER_TOKEN * size},
        tokens=round(tokens),
        loss=known["loss"],
        unique_tokens=round(known["unique_tokens"]) if "unique_tokens" in known else None,
        hyper_parameters={key: value for key, value in row.items() if key not in used and key is not None},
        source=place,
    )


def _number(value: Any, place: str) -> float:
    try:
        number = float(str(value).replace(",", "").replace("_", ""))
    except ValueError as error:
        raise DataError(f"{place} holds {value!r}, which is no number.") from error
    if not 0 < number < float("inf"):
        raise DataError(f"{place} holds {value!r}; it must be positive and finite.")
    return number
