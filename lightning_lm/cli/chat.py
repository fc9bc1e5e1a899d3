"""The verb ``lightning-lm chat``: a conversation in the terminal, with a checkpoint or with a server."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lightning_lm.cli.generate import LoadModel, add_model_arguments, load_generator, printable
from lightning_lm.errors import ConfigurationError, LightningLMError, UsageError

__all__ = ["add_arguments", "run"]

_BLOCK = '"""'
_MOST_TOKENS = 2048
_HELP = """\
/system TEXT      set the system prompt (without TEXT: remove it)
/temperature X    0 always takes the likeliest token
/reset            begin a new conversation
/retry            another answer to the last message
/save FILE        write the conversation as JSON, for generate --messages
/help             these lines
/quit             end (Ctrl-D does too)
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C stops an answer.
"""

Message = dict[str, str]


class Partner(Protocol):
    """The other side of a conversation."""

    def reply(self, messages: list[Message], temperature: float) -> Iterator[str]:
        """Yield the text of an answer while it grows."""
        ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    add_model_arguments(parser, required=False)
    parser.add_argument("--server", metavar="URL", help="talk to a server instead, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--api-key-variable",
        metavar="NAME",
        default="LIGHTNING_LM_API_KEY",
        help="environment variable with the server's key (default: %(default)s)",
    )
    parser.add_argument("--model", metavar="NAME", help="model on the server (default: its first)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="X", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest tokens up to this probability"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default: what the context leaves)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")


def run(namespace: argparse.Namespace, load_model: LoadModel) -> int:
    """Talk until the input ends.

    Args:
        namespace: Parsed arguments of `add_arguments`.
        load_model: See `lightning_lm.cli.generate.run`.
    """
    if (namespace.checkpoint is None) == (namespace.server is None):
        raise UsageError("chat needs either --checkpoint PATH or --server URL.")
    _check_temperature(namespace.temperature)
    partner: Partner
    if namespace.server is not None:
        from lightning_lm.cli.chat_server import ServerPartner

        partner = ServerPartner(namespace)
    else:
        partner = _LocalPartner(namespace, load_model)
    Conversation(partner, namespace.system, namespace.temperature).run()
    return 0


class _LocalPartner:
    """The model of a checkpoint, by its chat template."""

    def __init__(self, namespace: argparse.Namespace, load_model: LoadModel) -> None:
        from lightning_lm.data.post_training.tokenizer_template import TokenizerTemplate

        self._generator, self._namespace = load_generator(namespace, load_model), namespace
        self._tokenizer: Any = self._generator.tokenizer
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ConfigurationError(
                "The model has no chat template, so it knows no conversations. Train it on some first (--data.template "
                "ChatML), or let lightning-lm generate continue a text."
            )
        self._template = TokenizerTemplate()
        self._num_answers = 0

    def reply(self, messages: list[Message], temperature: float) -> Iterator[str]:
        from lightning_lm.generation.prompt_checks import room_for, stated_context_length
        from lightning_lm.generation.sampling import Sampling

        namespace = self._namespace
        prompt = self._template.prompt_ids(messages, self._tokenizer)
        limit, _ = stated_context_length(self._generator.model)
        if limit is not None and len(prompt) > limit:
            raise ConfigurationError(f"The conversation has {len(prompt)} tokens, and the context {limit}: /reset it.")
        seed = None if namespace.seed is None else namespace.seed + self._num_answers
        self._num_answers += 1
        return self._generator.stream(
            prompt,
            sampling=Sampling(temperature=temperature, top_p=namespace.top_p, seed=seed),
            max_new_tokens=room_for(
                self._generator.model, self._tokenizer, [prompt], namespace.max_new_tokens or _MOST_TOKENS
            ),
            stop_ids=self._template.stop_ids(self._tokenizer),
        )


class Conversation:
    """Reads messages and commands from standard input, and writes answers to standard output.

    Args:
        partner: The other side.
        system: System prompt.
        temperature: That of the sampling.
    """

    def __init__(self, partner: Partner, system: str | None, temperature: float) -> None:
        self._partner, self._system, self._temperature = partner, system, temperature
        self._messages: list[Message] = []
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._set_system,
            "temperature": self._set_temperature,
            "reset": self._reset,
            "retry": self._retry,
            "save": self._save,
            "help": lambda _: _write(_HELP),
        }

    def run(self) -> None:
        """Go on until the input ends."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history
            _write("/help lists the commands; Ctrl-D ends.\n")
        while True:
            try:
                text = self._read()
            except EOFError:
                break
            except KeyboardInterrupt as stop:
                _reraise_signal(stop)
                _write("\n")
                continue
            if text.strip() in ("/quit", "/exit"):
                break
            self._handle(text)
        if self._is_terminal:
            _write("\n")

    def _read(self) -> str:
        """Return a message of one line or more."""
        lines = [self._line("> ")]
        if lines[0].lstrip().startswith(_BLOCK):
            lines = [lines[0].lstrip().removeprefix(_BLOCK)]
            while not lines[-1].rstrip().endswith(_BLOCK):
                lines.append(self._line(". "))
            lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
        else:
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(self._line(". "))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        return input(prompt if self._is_terminal else "")

    def _handle(self, text: str) -> None:
        if not text.strip():
            return
        name, _, rest = text.strip().partition(" ")
        try:
            if not name.startswith("/"):
                self._answer(text)
            elif name[1:] in self._commands:
                self._commands[name[1:]](rest.strip())
            else:
                _write(f"There is no command {name}; /help lists them.\n")
        except (LightningLMError, OSError) as error:
            _write(f"{error}\n")

    def _answer(self, text: str) -> None:
        """Add a message and the answer to it; one that fails leaves the conversation as it was."""
        self._messages.append({"role": "user", "content": text})
        answer = ""
        try:
            system = [] if not self._system else [{"role": "system", "content": self._system}]
            for piece in self._partner.reply([*system, *self._messages], self._temperature):
                answer += piece
                _write(piece)
        except KeyboardInterrupt as stop:
            _reraise_signal(stop)
            _write(" [stopped]")
        except (LightningLMError, OSError):
            self._messages.pop()
            raise
        _write("\n")
        self._messages.append({"role": "assistant", "content": answer})

    def _set_system(self, text: str) -> None:
        self._system = text or None
        _write("The system prompt is set.\n" if text else "There is no system prompt.\n")

    def _set_temperature(self, text: str) -> None:
        try:
            temperature = float(text)
        except ValueError:
            raise ConfigurationError(f"/temperature {text} is no number; write /temperature 0.7.") from None
        _check_temperature(temperature)
        self._temperature = temperature

    def _reset(self, _: str) -> None:
        self._messages.clear()
        _write("A new conversation.\n")

    def _retry(self, _: str) -> None:
        if not self._messages:
            raise ConfigurationError("There is no message to answer again.")
        kept, self._messages = self._messages, self._messages[:-2]
        try:
            self._answer(kept[-2]["content"])
        except (LightningLMError, OSError):
            self._messages = kept
            raise

    def _save(self, text: str) -> None:
        if not text:
            raise ConfigurationError("Name a file: /save conversation.json")
        from lightning_lm.storage.replacing import replacing

        system = [] if not self._system else [{"role": "system", "content": self._system}]
        path = Path(text).expanduser()
        with replacing(path) as file:
            file.write(json.dumps([*system, *self._messages], ensure_ascii=False, indent=2).encode())
        _write(f"Wrote {len(self._messages)} messages to {path}.\n")


def _check_temperature(temperature: float) -> None:
    if not 0 <= temperature <= 100:
        raise ConfigurationError(f"temperature={temperature} must be a number from 0 to 100.")


def _reraise_signal(stop: KeyboardInterrupt) -> None:
    """Raise what SIGTERM raised; only Ctrl-C stops no more than an answer."""
    if type(stop) is not KeyboardInterrupt:
        raise stop


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
