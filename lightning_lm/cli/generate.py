"""The verb ``lightning-lm generate``: continue prompts with the model of a checkpoint."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.numbers import COUNT, Number
from lightning_lm.errors import CheckpointError, ConfigurationError, LightningLMError
from lightning_lm.parts import Limit
from lightning_lm.storage import resolve_checkpoint

if TYPE_CHECKING:
    from lightning_lm.generation.generator import Generator
    from lightning_lm.generation.sampling import Sampling
    from lightning_lm.protocols import Tokenizer

__all__ = ["LoadModel", "add_arguments", "add_model_arguments", "load_generator", "printable", "run"]

_MAX_NEW_TOKENS = 256

LoadModel = Callable[..., tuple[Any, "Tokenizer | None"]]


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments that name a model, its tokenizer and device.

    Args:
        parser: Parser of a verb that runs a model.
        required: True if the verb needs a model.
    """
    parser.add_argument(
        "--checkpoint",
        required=required,
        type=Path,
        metavar="PATH",
        help="a .ckpt file, the folder of runs (the newest finished one is taken), a Hugging Face folder, or one with "
        "adapters of peft",
    )
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="model of the adapters (default: the one that they name)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="folder or file (default: the one in the checkpoint)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if there is one)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="text to continue, or source of an encoder-decoder, '-' for standard input; may be repeated (default: the "
        "beginning of a document)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's turn, written by the model's chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt, with --chat")
    parser.add_argument("--messages", type=Path, metavar="FILE", help="JSON list of earlier turns, with --chat")
    parser.add_argument(
        "--max-new-tokens",
        type=COUNT,
        metavar="N",
        help=f"most tokens to add (default: {_MAX_NEW_TOKENS}, or as many as the model's context length leaves)",
    )
    parser.add_argument(
        "--num-samples", type=COUNT, default=1, metavar="N", help="answers to each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    _add_sampling_arguments(parser.add_argument_group("how tokens are chosen"))


def run(namespace: argparse.Namespace, load_model: LoadModel) -> int:
    """Carry out the verb and return the exit status; what a user can mend is said in one line on stderr.

    Args:
        namespace: Parsed arguments of `add_arguments`.
        load_model: Returns model and tokenizer of a file or folder. Given from outside, as it lies in a layer above.
    """
    try:
        sampling = _sampling(namespace)
        prompts = [_prompt(text) for text in namespace.prompts or [""]]
        generator = load_generator(namespace, load_model, reads_sources=True)
        inputs = _inputs(prompts, generator, namespace)
        if hasattr(generator.model, "given"):
            sources = inputs if namespace.chat else prompts
            generator, inputs = _after_sources(generator, sources)
            prompts = [""] if len(prompts) == 1 else [f"{text}\n" for text in prompts]
        if namespace.max_new_tokens is None:
            from lightning_lm.generation.prompt_checks import room_for

            assert generator.tokenizer is not None
            namespace.max_new_tokens = room_for(generator.model, generator.tokenizer, inputs, _MAX_NEW_TOKENS)
        if len(prompts) == namespace.num_samples == 1:
            _stream(generator, prompts[0], inputs[0], sampling, namespace)
        else:
            _batch(generator, prompts, inputs, sampling, namespace)
    except BrokenPipeError:
        raise
    except (LightningLMError, OSError) as error:
        sys.stderr.write(f"lightning-lm generate: {error}\n")
        return 1
    return 0


def _add_sampling_arguments(group: Any) -> None:
    def add(name: str, limit: Limit, text: str, default: float | None = None, *, whole: bool = False) -> None:
        kind = Number(limit, whole=whole)
        group.add_argument(f"--{name}", type=kind, metavar="N" if whole else "X", default=default, help=text)

    add("temperature", Limit.NON_NEGATIVE, "0 is greedy (default: %(default)s)", 0.8)
    add("top-k", Limit.COUNT, "keep this many of the likeliest tokens", whole=True)
    add("top-p", Limit.UP_TO_ONE, "keep the likeliest tokens up to this probability", 1.0)
    add("min-p", Limit.FRACTION, "keep tokens this likely beside the likeliest", 0.0)
    add("repetition-penalty", Limit.POSITIVE, "above 1 discourages what was said", 1.0)
    add("presence-penalty", Limit.FINITE, "in logits, once for a token of the answer", 0.0)
    add("frequency-penalty", Limit.FINITE, "in logits, each time a token was said", 0.0)
    add("seed", Limit.NON_NEGATIVE, "the same seed gives the same text", whole=True)


def _sampling(namespace: argparse.Namespace) -> "Sampling":
    import dataclasses

    from lightning_lm.generation.sampling import Sampling

    return Sampling(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(Sampling)})


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def load_generator(namespace: argparse.Namespace, load_model: LoadModel, *, reads_sources: bool = False) -> "Generator":
    """Return the model that the arguments name, on its device and with its tokenizer.

    Args:
        namespace: Parsed arguments of `add_model_arguments`.
        load_model: See `run`.
        reads_sources: True if an encoder-decoder can be used.

    Raises:
        CheckpointError: If the path holds no usable model.
        ConfigurationError: If no tokenizer is known, or another one than that of the training, or the model does not
            continue texts.
    """
    import torch

    from lightning_lm.generation.generator import Generator

    path = resolve_checkpoint(namespace.checkpoint)
    if path.is_dir():
        _check_folder(path)
    try:
        model, tokenizer = load_model(path, **({} if namespace.base is None else {"base": namespace.base}))
    except OSError as error:  # of a truncated file it says no more than "invalid argument"
        raise CheckpointError(f"{path} cannot be read: {error}. It may be truncated; use an earlier one.") from error
    if namespace.tokenizer is not None:
        from lightning_lm.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(namespace.tokenizer)
    if tokenizer is None:
        raise ConfigurationError(f"{path} holds no tokenizer; name the one of its training with --tokenizer PATH.")
    _check_vocabulary(model, tokenizer)
    if hasattr(model, "given") and not reads_sources:
        raise ConfigurationError(
            f"{path} is an encoder-decoder: it writes targets to sources and does not continue texts. Use "
            "lightning-lm generate, or TextMetrics in trainer.test for BLEU, chrF and ROUGE."
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(namespace.device) if namespace.device else accelerator
    return Generator(model.to(device or "cpu"), tokenizer)


def _check_folder(folder: Path) -> None:
    if (folder / "meta.pt").is_file():
        raise CheckpointError(
            f"{folder} holds the parts that the ranks of a sharded run have written. Make one file of them with "
            f"lightning-lm consolidate {folder}, and give that file."
        )
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        found = sorted(folder.rglob("*.ckpt"))
        hint = f" Did you mean {found[-1]}?" if found else ""
        raise CheckpointError(f"{folder} is no Hugging Face folder: it has no config.json.{hint}")


def _check_vocabulary(model: Any, tokenizer: "Tokenizer") -> None:
    size = model.head.weight.shape[0]
    if tokenizer.vocab_size > size:
        raise ConfigurationError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model knows {size}; it was trained with another "
            "tokenizer. Name that one with --tokenizer PATH."
        )


def _inputs(prompts: list[str], generator: "Generator", namespace: argparse.Namespace) -> list[str | list[int]]:
    """Return the prompts as the model gets them; special tokens in them count as such."""
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    if not namespace.chat:
        if namespace.system is not None or namespace.messages is not None:
            raise ConfigurationError("--system and --messages belong to a conversation; add --chat.")
        return [
            [*generator.begin_ids, *tokenizer.encode(text, allow_special=True)]
            if any(token in text for token in tokenizer.special_tokens)
            else text
            for text in prompts
        ]
    apply = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or getattr(tokenizer, "chat_template", None) is None:
        raise ConfigurationError(
            "--chat needs a chat template, and the model has none. Train it on conversations first (--data.template "
            "ChatML), or leave --chat out."
        )
    before = [] if namespace.system is None else [{"role": "system", "content": namespace.system}]
    before += [] if namespace.messages is None else _read_messages(namespace.messages)
    return [
        tokenizer.encode(
            apply([*before, {"role": "user", "content": text}], add_generation_prompt=True), allow_special=True
        )
        for text in prompts
    ]


def _after_sources(
    generator: "Generator", sources: Sequence[str | list[int]]
) -> tuple["Generator", list[str | list[int]]]:
    """Return a generator of the targets of sources, and its prompts."""
    from lightning_lm.generation import Generator, read_sources

    tokenizer = generator.tokenizer
    assert tokenizer is not None
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ended = [text if isinstance(text, str) else [*text, *end] for text in sources]
    model, prompts = read_sources(generator.model, tokenizer, ended)
    return Generator(model, tokenizer), list(prompts)


def _read_messages(path: Path) -> list[dict[str, Any]]:
    from lightning_lm.storage.json_text import parse_json

    try:
        messages = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} is no JSON: {error}. Write a list of turns with role and content.") from error
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise ConfigurationError(f'{path} must hold a list such as [{{"role": "user", "content": "Hello"}}].')
    return messages


def _stream(
    generator: "Generator", prompt: str, given: str | list[int], sampling: "Sampling", namespace: argparse.Namespace
) -> None:
    pieces = generator.stream(
        given, sampling=sampling, max_new_tokens=namespace.max_new_tokens, stop_strings=namespace.stop
    )
    _write(prompt)
    for piece in pieces:
        _write(piece)
    _write("\n")


def _batch(
    generator: "Generator",
    prompts: list[str],
    given: list[str | list[int]],
    sampling: "Sampling",
    namespace: argparse.Namespace,
) -> None:
    completions = generator.generate(
        given,
        sampling=sampling,
        max_new_tokens=namespace.max_new_tokens,
        stop_strings=namespace.stop,
        num_samples=namespace.num_samples,
    )
    for index, completion in enumerate(completions):
        prompt, sample = divmod(index, namespace.num_samples)
        title = f"prompt {prompt + 1}" if namespace.num_samples == 1 else f"prompt {prompt + 1}, sample {sample + 1}"
        _write(f"--- {title} ---\n{prompts[prompt]}{completion.text}\n")


def _write(text: str) -> None:
    """Write at once; in a terminal control characters are shown, not obeyed: a model's bytes must not command it."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Return a text without control characters other than line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
