"""The ``lightning-lm`` command: Lightning's verbs over YAML, and the verbs that need no Trainer.

Nothing heavy is imported before the verb is known, so that ``--help`` answers at once.
"""

import argparse
import contextlib
import errno
import importlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from lightning_lm import __version__
from lightning_lm.errors import LightningLMError, RunStopped, UsageError

__all__ = ["main"]


class _Verb(NamedTuple):
    summary: str
    module: str


_TRAINER = "lightning_lm.cli.trainer"
_PROFILE = "lightning_lm.cli.profile"
_PLAN = "lightning_lm.cli.plan"
_LIKE_FIT = (_TRAINER, _PROFILE, _PLAN)
"""Modules whose verbs take the command line of ``fit``."""
_VERBS = {
    "fit": _Verb("train a model (the main job)", _TRAINER),
    "validate": _Verb("measure a checkpoint on the validation text", _TRAINER),
    "test": _Verb("measure a checkpoint on the test text", _TRAINER),
    "predict": _Verb("run a checkpoint over a data set", _TRAINER),
    "profile": _Verb("time the parts of a training step", _PROFILE),
    "plan": _Verb("memory and speed of a recipe on many GPUs, strategy by strategy", _PLAN),
    "kernels": _Verb("measure launch settings on this GPU; say what runs here", "lightning_lm.cli.kernels"),
    "generate": _Verb("continue a prompt with a checkpoint", "lightning_lm.cli.generate"),
    "serve": _Verb("an OpenAI-compatible server with a chat page, for a checkpoint", "lightning_lm.cli.serve"),
    "chat": _Verb("talk to a checkpoint or a server in the terminal", "lightning_lm.cli.chat"),
    "evaluate": _Verb("scores on tasks, of a checkpoint or a server; compare two", "lightning_lm.cli.evaluate"),
    "consolidate": _Verb("write a sharded checkpoint as a plain one", "lightning_lm.cli.consolidate"),
    "export": _Verb("write a checkpoint's model for transformers, servers or llama.cpp", "lightning_lm.cli.export"),
    "import": _Verb("write a GGUF file as a Hugging Face folder", "lightning_lm.cli.import_model"),
    "demo": _Verb("fetch a small published model, or make a crawl to curate", "lightning_lm.cli.demo"),
    "curate": _Verb("clean web archives, HTML, PDF and text into a corpus", "lightning_lm.cli.curate"),
    "tokenizer": _Verb("train, use or compare tokenizers", "lightning_lm.cli.tokenizer"),
    "ngram": _Verb("fit an n-gram model (Kneser-Ney), measure it, sample; ARPA files", "lightning_lm.cli.ngram"),
    "word2vec": _Verb("train vectors of words; neighbours and analogies", "lightning_lm.cli.word2vec"),
    "road": _Verb("go through all stages, from text to an aligned model; a report", "lightning_lm.cli.road"),
    "sweep": _Verb("train many runs under one budget, into a ledger", "lightning_lm.cli.sweep"),
    "scaling": _Verb("fit a ledger of runs, and plan what to train next", "lightning_lm.cli.scaling"),
    "recipes": _Verb("list, show or copy the recipes that come with the package", "lightning_lm.cli.recipes"),
    "docs": _Verb("open the documentation, or print how to build it", "lightning_lm.cli.docs"),
}
_USAGE_ERROR, _FAILURE, _INTERRUPTED = 2, 1, 130
_WRITES_WHOLE = ("tokenizer", "ngram", "word2vec", "export", "import", "consolidate", "demo")
_TAKES_MODEL_LOADER = ("generate", "ngram", "serve", "chat")
_NOT_TRAINING = "No step was under way; checkpoints are as they were."
"""Message for `fit`, which handles signals itself while it trains: it stops at the end of a step, saved."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a verb as Ctrl-C does, with a status of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    Args:
        argv: Words after the program's name; those of the process when left out.

    Returns:
        0 when all went well, 1 after an error, 2 after a mistake on the command line or in the YAML, 130 after Ctrl-C,
        128 + its number after another signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # modules beside the YAML are found; last, so that they shadow no package
    left = _NOT_TRAINING if words[:1] == ["fit"] else ""
    try:
        with _terminable():
            return _dispatch(words)
    except RunStopped as stop:
        return int(stop.code or 0)
    except UsageError as error:
        print(error, file=sys.stderr)
        return _USAGE_ERROR
    except LightningLMError as error:
        notes = getattr(error, "__notes__", ())
        print("\n".join([f"\nError ({type(error).__name__}): {error}", *notes]), file=sys.stderr)
        return _FAILURE
    except _Terminated as error:
        print(f"\nStopped by SIGTERM. {str(error) or left}".rstrip(), file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt as error:
        print(f"\nStopped by the user. {str(error) or left}".rstrip(), file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output went away (`| head`): nothing is left to say, or to flush
        else:
            print(f"\nError: {_described(error)}", file=sys.stderr)
        return _FAILURE


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a verb as Ctrl-C does, so that what it has begun is cleaned up and it says what is left."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    owner = os.getpid()

    def terminate(signum: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker ends at once
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif signal.getsignal(signum) is terminate:  # else a run handles it, and calls this too
            raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _left(verb: str, arguments: argparse.Namespace) -> str:
    """Return what an interrupted verb leaves behind."""
    if verb == "sweep":
        return f"Finished runs are in {arguments.ledger}; the same command trains the others."
    if verb.startswith("evaluate") and arguments.output is not None:
        return f"What was asked is kept beside {arguments.output}; the same command goes on."
    output = getattr(arguments, "output", None) if verb in _WRITES_WHOLE else None
    return "" if output is None else f"{output} is as it was."


def _described(error: OSError) -> str:
    """Return what the system refused, for which path, and what to change."""
    remedies = {
        errno.ENOSPC: "Free some space, or write elsewhere.",
        errno.EDQUOT: "Free some space, or write elsewhere.",
        errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or write elsewhere.",
        errno.EROFS: "Write elsewhere.",
        errno.EACCES: "Change the permissions, or use another path.",
        errno.EPERM: "Change the permissions, or use another path.",
        errno.ENOENT: f"Check the path (looked from {os.getcwd()}).",
        errno.ENOTDIR: "A part of the path is a file.",
        errno.EISDIR: "Name a file, not a folder.",
    }
    path = f" ({error.filename})" if error.filename is not None else ""
    reason = f"{error.strerror or error}{path}."
    return f"{reason} {remedies[error.errno]}" if error.errno in remedies else reason


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"lightning-lm {__version__}")
        return 0
    name, *rest = words
    if name not in _VERBS:
        return _unknown_verb(name)
    if _VERBS[name].module in _LIKE_FIT and not {"-h", "--help"}.isdisjoint(rest):
        from lightning_lm.cli.pages import plan_page, trainer_page

        print(plan_page() if _VERBS[name].module == _PLAN else trainer_page(name), end="")
        return 0
    if rest[:1] == ["judge"] and name == "evaluate":  # a verb of its own, with its own help
        return _run_command("evaluate judge", importlib.import_module("lightning_lm.cli.judge"), rest[1:])
    module = importlib.import_module(_VERBS[name].module)
    if module.__name__ in _LIKE_FIT:
        module.run(name, rest)
        return 0
    return _run_command(name, module, rest)


def _run_command(name: str, module: Any, words: list[str]) -> int:
    summary = _VERBS[name].summary if name in _VERBS else "models compared, graded and ranked by another model"
    parser = argparse.ArgumentParser(prog=f"lightning-lm {name}", description=summary)
    module.add_arguments(parser)
    line = shlex.join(["lightning-lm", *name.split(), *words])
    arguments, settings = parser.parse_known_args(words, argparse.Namespace(command_line=line))
    if settings and not getattr(module, "TAKES_SETTINGS", False):
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    arguments.settings = settings
    try:
        if name in _TAKES_MODEL_LOADER:
            return module.run(arguments, _load_model) or 0
        return module.run(arguments) or 0
    except KeyboardInterrupt as stop:
        raise type(stop)(*(stop.args or (_left(name, arguments),))) from None


def _load_model(*arguments: Any, **settings: Any) -> Any:
    from lightning_lm.modules import load_model

    return load_model(*arguments, **settings)


def _unknown_verb(name: str) -> int:
    import difflib

    near = difflib.get_close_matches(name, _VERBS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    print(f"Unknown verb {name!r}.{hint} The verbs are: {', '.join(_VERBS)}.", file=sys.stderr)
    return _USAGE_ERROR


def _help() -> str:
    lines = [f"  {name:<11} {verb.summary}" for name, verb in _VERBS.items()]
    return "\n".join(
        [
            "usage: lightning-lm VERB [options]",
            "",
            "Language models with a stock PyTorch Lightning Trainer.",
            "",
            *lines,
            "",
            "  lightning-lm fit --config pretrain/quickstart       train by a recipe or YAML",
            "  lightning-lm fit --config my.yaml --ckpt_path last  resume its newest run",
            "  lightning-lm VERB --help                            the options of a verb",
        ]
    )
