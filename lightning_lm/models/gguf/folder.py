"""A GGUF file as a folder in the format of Hugging Face, and such a folder as a GGUF file; one tensor at a time."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models.gguf.architectures import Architecture, architecture_of, for_model_type
from lightning_lm.models.gguf.file import DIGEST_KEY, NO_DIGEST, GGUFFile, gguf_package, put_digest
from lightning_lm.models.gguf.settings import ROPE_FACTORS, complete, read_settings, rope_factors, write_settings
from lightning_lm.models.gguf.vocabulary import tokenizer_files, vocabulary_metadata
from lightning_lm.models.huggingface.weights import (
    StoredTensor,
    read_json,
    read_shapes,
    read_tensors,
    write_json,
    write_tensors,
)
from lightning_lm.storage import TOKENIZER_FILES, filling, replacing

__all__ = ["QUANTIZATIONS", "Quantization", "export_gguf", "import_gguf"]

Quantization = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
QUANTIZATIONS: dict[Quantization, tuple[str, str]] = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
"""Types of matrices and of whole files in the ``gguf`` package, by the names of the command line."""
_SHARD_BYTES = 5_000_000_000
_BLOCK = 32
"""Numbers that are quantized together, within a row."""


def import_gguf(
    path: str | Path, folder: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: bool = True
) -> dict[str, Any]:
    """Write the model of a GGUF file as a folder that `load_huggingface` and ``transformers`` open.

    Args:
        path: The file. Quantized weights become the numbers that they stand for.
        folder: Created if needed; an earlier model in it is replaced as a whole.
        dtype: That of the weights in the folder. float32 has every number of a quantized file exactly.
        tokenizer: True to write the tokenizer and the chat template of the file too.

    Returns:
        The content of the ``config.json``.

    Raises:
        CheckpointError: If the file is damaged, or is no whole model.
        ConfigurationError: If its architecture is not known here.
        TokenizerError: If its vocabulary has no form in ``tokenizer.json``.
        MissingDependencyError: If the ``gguf`` package is not installed.
    """
    file = GGUFFile(Path(path))
    architecture = architecture_of(file.metadata, path)
    settings = read_settings(file, architecture)
    tensors = list(_stored(file, architecture, settings, dtype))
    files = tokenizer_files(file.metadata, path) if tokenizer else {}
    known_by = (*TOKENIZER_FILES, "config.json") if tokenizer else ("config.json",)
    with filling(Path(folder), known_by=known_by) as fresh:
        write_tensors(fresh, tensors, max_shard_bytes=_SHARD_BYTES)
        for name, content in files.items():
            (fresh / name).write_text(content, encoding="utf-8")
        settings["dtype"] = str(dtype).removeprefix("torch.")
        write_json(fresh / "config.json", settings)
    return settings


def _stored(
    file: GGUFFile, architecture: Architecture, settings: dict[str, Any], dtype: torch.dtype
) -> Iterator[StoredTensor]:
    for name, shape in file.shapes.items():
        if name == ROPE_FACTORS:
            continue
        theirs = architecture.theirs(name)
        if theirs is None:
            raise ConfigurationError(
                f"{file.path} has a tensor {name}, which the architecture {architecture.name!r} does not have here."
            )
        size = torch.Size(shape).numel() * dtype.itemsize
        yield StoredTensor(theirs, size, partial(_dequantized, file, name, architecture, settings, dtype))


def _dequantized(
    file: GGUFFile, name: str, architecture: Architecture, settings: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    return architecture.read(name, file.read(name), settings).to(dtype)


def export_gguf(
    folder: str | Path, path: str | Path, *, quantization: Quantization = "f16", splitting: str | None = None
) -> None:
    """Write a folder in the format of Hugging Face as a GGUF file, which llama.cpp and its relatives run.

    Args:
        folder: Output of `export_model`, of ``save_pretrained`` or a clone of a repository of the Hub, with a
            ``tokenizer.json``.
        path: The file; replaced as a whole.
        quantization: Type of the matrices. Norms and biases stay float32; a matrix whose rows are no multiple of 32 is
            written as f16.
        splitting: Name that llama.cpp has for the rule by which the tokenizer splits words; ``None`` recognises it.

    Raises:
        CheckpointError: If the folder has no model.
        ConfigurationError: If llama.cpp does not compute what the model computes.
        TokenizerError: If it has no form for the tokenizer.
        MissingDependencyError: If the ``gguf`` package is not installed.
    """
    folder, path = Path(folder), Path(path)
    package = gguf_package(f"write {path.name}")
    raw = read_json(folder / "config.json")
    shapes = read_shapes(folder)
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if rows is None:
        raise CheckpointError(f"{folder} has no embed_tokens.weight; a whole causal language model is needed.")
    settings = complete(raw, rows)
    architecture = for_model_type(settings)
    metadata = write_settings(settings, architecture) | vocabulary_metadata(folder, rows, splitting)
    with replacing(path) as file:
        writer = package.GGUFWriter(file.name, architecture.name)
        writer.add_name(folder.name)
        writer.add_file_type(int(package.LlamaFileType[QUANTIZATIONS[quantization][1]]))
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            _add(writer, package, key, value)
        writer.add_string(DIGEST_KEY, NO_DIGEST)
        _write(writer, package, _Plan(folder, architecture, settings, shapes, quantization))
        writer.close()
        put_digest(Path(file.name))


def _add(writer: Any, package: Any, key: str, value: Any) -> None:
    """Add a value by its type; llama.cpp reads integers as uint32 and numbers as float32."""
    kinds = package.GGUFValueType
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}[
        type(value)
    ]
    sub = (
        {int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value[0])]
        if value and kind is kinds.ARRAY
        else None
    )
    if kind is kinds.ARRAY and not value:
        return
    writer.add_key_value(key, value, kind, sub)


@dataclass(frozen=True)
class _Plan:
    """A folder, and how its tensors are written."""

    folder: Path
    architecture: Architecture
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    quantization: Quantization

    def names(self) -> dict[str, str]:
        """Return the names in the GGUF file of those tensors of the folder that are written."""
        tied = self.architecture.tied or self.settings.get("tie_word_embeddings", False)
        kept = [name for name in self.shapes if not (tied and name == "lm_head.weight")]
        found = {name: self.architecture.ours(name) for name in kept}
        unknown = [name for name, ours in found.items() if ours is None]
        if unknown:
            raise ConfigurationError(
                f"{self.folder} has {unknown[0]}, which llama.cpp has no place for in {self.architecture.name!r}."
            )
        return {name: ours for name, ours in found.items() if ours is not None}

    def kind(self, name: str) -> str:
        """Return the type in which a tensor is written."""
        shape = self.shapes[name]
        if len(shape) < 2:
            return "F32"
        kind = QUANTIZATIONS[self.quantization][0]
        return "F16" if kind.startswith("Q") and shape[-1] % _BLOCK else kind


def _write(writer: Any, package: Any, plan: _Plan) -> None:
    """Write the tensors: first what is said of each, then one after the other."""
    quantize = importlib.import_module("gguf.quants").quantize
    names, factors = plan.names(), rope_factors(plan.settings)
    kinds = {name: package.GGMLQuantizationType[plan.kind(name)] for name in names}
    for name, ours in names.items():
        block, size = package.GGML_QUANT_SIZES[kinds[name]]
        num_bytes = math.prod(plan.shapes[name]) // block * size
        writer.add_tensor_info(ours, plan.shapes[name], np.dtype(np.float32), num_bytes, kinds[name])
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in read_tensors(plan.folder):
        if name in names:
            values = plan.architecture.write(names[name], tensor.float(), plan.settings)
            writer.write_tensor_data(quantize(values.contiguous().numpy(), kinds[name]))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
