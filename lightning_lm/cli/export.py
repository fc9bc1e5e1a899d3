"""The verb ``lightning-lm export``: the model of a checkpoint, as ``transformers``, servers or llama.cpp open it."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.storage import held, resolve_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from lightning_lm.protocols import Tokenizer

__all__ = ["add_arguments", "run"]

_DTYPES = ("float32", "bfloat16", "float16")
_QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="a .ckpt file, the folder of runs (the newest finished one is taken), or one with adapters of peft",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PATH", help="folder to write, or the file of --format gguf"
    )
    parser.add_argument(
        "--format",
        choices=("huggingface", "gguf"),
        default="huggingface",
        help="a folder for transformers, vLLM and SGLang (default), or a file for llama.cpp, Ollama and LM Studio",
    )
    parser.add_argument("--quantization", choices=_QUANTIZATIONS, help="of the matrices in a GGUF file (default: f16)")
    parser.add_argument(
        "--splitting", metavar="NAME", help="llama.cpp's name for how the tokenizer splits words (default: recognised)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="folder or file (default: the one in the checkpoint)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights that are written (default: their own)")
    parser.add_argument(
        "--family", metavar="NAME", help="model_type to write, such as llama (default: the first that can express it)"
    )
    parser.add_argument(
        "--adapters",
        choices=("merge", "only", "drop"),
        default="merge",
        help="of a model with adapters: write it with them merged (default), write them alone in the format of peft, "
        "or write the model without them",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="model that the adapters belong to (default: the one that they name)"
    )


def run(namespace: argparse.Namespace) -> None:
    """Carry out the verb.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        CheckpointError: If there is no checkpoint, or it does not hold a model of this package.
        ConfigurationError: If no family can express the model, or the tokenizer has more ids than it.
    """
    if namespace.format == "gguf":
        _export_gguf(namespace)
        return
    if namespace.quantization is not None or namespace.splitting is not None:
        raise ConfigurationError("--quantization and --splitting belong to a GGUF file; add --format gguf.")
    with held(namespace.output, "choose another --output"):
        print(_export(namespace))


def _export_gguf(namespace: argparse.Namespace) -> None:
    """Write a GGUF file from a folder in the format of Hugging Face, which is written for it unless it is one."""
    from lightning_lm.models import export_gguf

    output: Path = namespace.output
    if output.is_dir():
        raise ConfigurationError(f"{output} is a folder; name the file: --output {output / 'model.gguf'}.")
    quantization: Any = namespace.quantization or "f16"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = namespace.checkpoint
        if not (folder / "config.json").is_file():
            folder = Path(temporary) / output.stem
            _export(argparse.Namespace(**{**vars(namespace), "output": folder}))
            if not (folder / "config.json").is_file() or "ForCausalLM" not in (folder / "config.json").read_text():
                raise ConfigurationError("A GGUF file holds a whole causal language model; leave out --format gguf.")
        export_gguf(folder, output, quantization=quantization, splitting=namespace.splitting)
    size = output.stat().st_size / 2**20
    print(f"{output} holds the model in {quantization} ({size:.1f} MiB): llama-cli -m {output}")


def _export(namespace: argparse.Namespace) -> str:
    """Write a folder, and return what it holds."""
    import torch

    from lightning_lm.models import export_model, remove_adapters, save_adapters
    from lightning_lm.modules.reward_folder import export_reward_model
    from lightning_lm.modules.reward_model import RewardModel
    from lightning_lm.tokenizers import load_tokenizer

    path, output = resolve_checkpoint(namespace.checkpoint), namespace.output
    model, tokenizer = _load(path, namespace)
    if namespace.tokenizer is not None:
        tokenizer = load_tokenizer(namespace.tokenizer)
    dtype = None if namespace.dtype is None else getattr(torch, namespace.dtype)
    if namespace.adapters != "merge" and not hasattr(model, "peft_config"):
        raise ConfigurationError(f"{path} has no adapters; leave out --adapters {namespace.adapters}.")
    if namespace.adapters == "only":
        save_adapters(model, output, base=namespace.base, family=namespace.family, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save(output)
        return _report_adapters(output)
    if isinstance(model, RewardModel):
        export_reward_model(model.backbone, model.score, output, tokenizer, dtype=dtype, family=namespace.family)
        return f"{output} holds a reward model: AutoModelForSequenceClassification.from_pretrained({str(output)!r})"
    model = remove_adapters(model) if namespace.adapters == "drop" else model
    export_model(model, output, tokenizer, dtype=dtype, family=namespace.family)
    return _report(model, tokenizer, output)


def _load(path: Path, namespace: argparse.Namespace) -> tuple["nn.Module", "Tokenizer | None"]:
    from lightning_lm.models.huggingface.peft_adapters import is_adapter_folder

    if is_adapter_folder(path):
        if namespace.adapters != "merge":
            raise ConfigurationError(f"{path} holds adapters alone already; it can be merged: leave out --adapters.")
    elif path.is_dir():
        found = sorted(path.rglob("*.ckpt"))
        hint = f" Did you mean {found[-1]}?" if found else " The folder of a Hugging Face model needs no export."
        raise CheckpointError(f"{path} is a folder, and --checkpoint takes a .ckpt file.{hint}")
    elif not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    from lightning_lm.modules import load_model, load_reward_model
    from lightning_lm.modules.checkpoint import is_reward_model

    if path.is_file() and is_reward_model(path):
        return load_reward_model(path)
    return load_model(path, merged=namespace.adapters == "merge", base=namespace.base)


def _report_adapters(folder: Path) -> str:
    import json

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    lines = [f"{folder} holds adapters: peft.PeftModel.from_pretrained(model, {str(folder)!r})"]
    if base is None:
        lines.append(
            "They name no model that they belong to. Write it with --adapters drop --output BASE if there is none yet, "
            "and repeat this with --base BASE."
        )
    return "\n".join(lines)


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
