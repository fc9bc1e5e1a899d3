"""The verb ``lightning-lm serve``: OpenAI's interface and a chat page over the model of a checkpoint."""

import argparse
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.generate import LoadModel, add_model_arguments, load_generator
from lightning_lm.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from lightning_lm.serving.engine import Engine

__all__ = ["add_arguments", "run"]

_KEY_VARIABLE = "LIGHTNING_LM_API_KEY"
_GRACE_S = 3
"""Seconds that open connections have to end after Ctrl-C."""
_LOOPBACK = ("127.", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that requests must carry (default: the environment variable {_KEY_VARIABLE}, or none)",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model (default: that of the file or folder)")
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--max-batch", **whole, default=16, help="most requests computed together (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", **whole, default=256, help="most requests that wait; more get status 429 (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for a request (default: %(default)g)"
    )
    parser.add_argument(
        "--prefix-cache",
        **whole,
        default=256,
        help="megabytes for what equal beginnings of prompts have in common (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-memory",
        **whole,
        help="megabytes for keys and values of the requests (default: half of what is free on the device)",
    )
    parser.add_argument(
        "--update-weights",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FOLDER",
        help="let clients load other weights from folders in this one (default: the current folder), for training with "
        "HTTPBackend",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which the page is reached, such as that of a reverse proxy; may be repeated",
    )


def run(namespace: argparse.Namespace, load_model: LoadModel) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        namespace: Parsed arguments of `add_arguments`.
        load_model: See `lightning_lm.cli.generate.run`.
    """
    _check(namespace)
    listening = _listen(namespace.host, namespace.port)
    with listening:
        from lightning_lm.serving.engine import Engine

        generator = load_generator(namespace, load_model)
        assert generator.tokenizer is not None
        engine = Engine(
            generator.model,
            generator.tokenizer,
            max_batch=namespace.max_batch,
            max_waiting=namespace.queue,
            prefix_bytes=namespace.prefix_cache << 20,
            cache_bytes=None if namespace.cache_memory is None else namespace.cache_memory << 20,
        )
        _serve(engine, namespace, listening)
    return 0


def _check(namespace: argparse.Namespace) -> None:
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "serve a model", "serve")
    least = {"max_batch": 1, "queue": 0, "prefix_cache": 0, "cache_memory": 1, "port": 0}
    for name, low in least.items():
        value = getattr(namespace, name)
        if value is not None and value < low:
            raise ConfigurationError(f"--{name.replace('_', '-')} {value} must be at least {low}.")
    if not namespace.timeout > 0:
        raise ConfigurationError(f"--timeout {namespace.timeout} must be above 0 seconds.")
    if namespace.update_weights is not None and not namespace.update_weights.is_dir():
        raise ConfigurationError(f"--update-weights {namespace.update_weights} is no folder; make it first.")
    namespace.api_key = namespace.api_key or os.environ.get(_KEY_VARIABLE) or None
    if namespace.api_key is not None and not (namespace.api_key.isascii() and namespace.api_key.isprintable()):
        raise ConfigurationError("The API key must be plain ASCII without control characters.")


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket: a port that is taken is found before the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"Cannot listen at {host}:{port}: {reason}. Choose another with --host and --port (0 takes a free one)."
        ) from error


def _serve(engine: "Engine", namespace: argparse.Namespace, listening: socket.socket) -> None:
    import uvicorn

    from lightning_lm.serving.server import Server

    name = namespace.name or model_name(namespace.checkpoint)
    server = Server(
        engine,
        name,
        api_key=namespace.api_key,
        timeout_s=namespace.timeout,
        weights_root=namespace.update_weights,
        allowed_hosts=namespace.allow_host,
    )
    host, port = listening.getsockname()[:2]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"
    config = uvicorn.Config(
        server.app,
        log_config=None,  # uvicorn's own closes the log handlers of every other package
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_S,
    )
    begun = time.monotonic()
    with engine.running():
        _say(f"Serving {name} at {address} (chat page at /, OpenAI's interface at /v1). Ctrl-C ends it.")
        if not engine.is_continuous:
            _say(f"{type(engine.model).__name__} is run in batches that start together: its cache takes no new rows.")
        if not host.startswith(_LOOPBACK) and namespace.api_key is None:
            _say("Whoever reaches this address can use the model; --api-key asks for a key.")
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt as stop:
            raise type(stop)(f"Served for {time.monotonic() - begun:.0f} s.") from None


def model_name(checkpoint: Path) -> str:
    """Return a name for the model of a checkpoint: its file's without suffix, or the run's for ``last.ckpt``.

    Args:
        checkpoint: File or folder.
    """
    path = checkpoint.resolve()
    generic = path.stem in ("last", "best") or path.stem.startswith("epoch=")
    parents = [parent.name for parent in path.parents if parent.name not in ("", "checkpoints")]
    return parents[0] if path.suffix == ".ckpt" and generic and parents else path.stem if path.suffix else path.name


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
