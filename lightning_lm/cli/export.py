"""The verb ``lightning-lm export``: the model of a checkpoint as a folder that ``transformers`` and servers open."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from lightning_lm.protocols import Tokenizer

__all__ = ["add_arguments", "run"]

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="a .ckpt file of a training run")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the files are written")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="folder or file (default: the one in the checkpoint)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights that are written (default: their own)")
    parser.add_argument(
        "--family", metavar="NAME", help="model_type to write, such as llama (default: the first that can express it)"
    )


def run(namespace: argparse.Namespace) -> None:
    """Carry out the verb.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        CheckpointError: If there is no checkpoint, or it does not hold a model of this package.
        ConfigurationError: If no family can express the model, or the tokenizer has more ids than it.
    """
    import torch

    from lightning_lm.models import export_model
    from lightning_lm.tokenizers import load_tokenizer

    model, tokenizer = _load(namespace.checkpoint)
    if namespace.tokenizer is not None:
        tokenizer = load_tokenizer(namespace.tokenizer)
    dtype = None if namespace.dtype is None else getattr(torch, namespace.dtype)
    export_model(model, namespace.output, tokenizer, dtype=dtype, family=namespace.family)
    print(_report(model, tokenizer, namespace.output))


def _load(path: Path) -> tuple["nn.Module", "Tokenizer | None"]:
    if path.is_dir():
        found = sorted(path.rglob("*.ckpt"))
        hint = f" Did you mean {found[-1]}?" if found else " The folder of a Hugging Face model needs no export."
        raise CheckpointError(f"{path} is a folder, and --checkpoint takes a .ckpt file.{hint}")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    from lightning_lm.callbacks import has_adapters, load_merged
    from lightning_lm.modules import load_model

    return load_merged(path) if has_adapters(path) else load_model(path)


def _report(model: "nn.Module", tokenizer: "Tokenizer | None", folder: Path) -> str:
    import json

    kind = json.loads((folder / "config.json").read_text())["model_type"]
    size = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{folder} holds a {kind} model of {size:,} parameters: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    ]
    if tokenizer is None:
        lines.append("No tokenizer lies beside it: the checkpoint carries none. Name it with --tokenizer PATH.")
    elif not (folder / "tokenizer.json").is_file():
        lines.append(
            f"Its {type(tokenizer).__name__} has no form that transformers knows: "
            f"lightning_lm.tokenizers.load_tokenizer({str(folder)!r})"
        )
    return "\n".join(lines)
