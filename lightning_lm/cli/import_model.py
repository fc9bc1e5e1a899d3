"""The verb ``lightning-lm import``: a GGUF file of llama.cpp as a folder in the format of Hugging Face."""

import argparse
from pathlib import Path

from lightning_lm.storage import held

__all__ = ["add_arguments", "run"]

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a GGUF file, of any quantization")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the files are written")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the weights that are written (default: float32, exact)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="tokenizer to write in place of the one in the file"
    )


def run(namespace: argparse.Namespace) -> None:
    """Carry out the verb.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        CheckpointError: If the file is damaged, or is no whole model.
        ConfigurationError: If its architecture is not known here.
        TokenizerError: If its vocabulary has no form in ``tokenizer.json``.
    """
    with held(namespace.output, "choose another --output"):
        import torch

        from lightning_lm.models import import_gguf
        from lightning_lm.tokenizers import load_tokenizer

        own = namespace.tokenizer is None
        tokenizer = None if own else load_tokenizer(namespace.tokenizer)
        dtype = getattr(torch, namespace.dtype)
        settings = import_gguf(namespace.file, namespace.output, dtype=dtype, tokenizer=own)
        if tokenizer is not None:
            tokenizer.save(namespace.output)
    print(next_steps(namespace.output, settings["model_type"]))


def next_steps(folder: Path, kind: str) -> str:
    """Return the description of a folder, and the commands that use it next.

    Args:
        folder: Folder of an imported model.
        kind: Its ``model_type``.
    """
    chats = "chat_template" in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    prompt = '--chat --prompt "What is the capital of France?"' if chats else '--prompt "The capital of France is"'
    model = f"--model.model CheckpointModel --model.model.checkpoint {folder} --data.tokenizer null"
    return "\n".join(
        [
            f"{folder} holds a {kind} model: load_huggingface({str(folder)!r}), or any reader of such folders",
            "What to type next:",
            f"  lightning-lm generate --checkpoint {folder} {prompt}",
            f"  lightning-lm fit --config sft/reverse {model}",
        ]
    )
