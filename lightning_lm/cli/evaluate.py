"""The verb ``lightning-lm evaluate``: scores of a checkpoint, or of a model behind a server, on tasks."""

import argparse
import hashlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lm.cli.generate import add_model_arguments, load_generator
from lightning_lm.cli.numbers import COUNT, WHOLE
from lightning_lm.cli.recipes import TASK_LISTS, find_recipe
from lightning_lm.errors import ConfigurationError, UsageError
from lightning_lm.storage import resolve_checkpoint

if TYPE_CHECKING:
    from lightning_lm.evals.local_model import LocalModel
    from lightning_lm.evals.requests import EvaluatedModel
    from lightning_lm.evals.task import Task
    from lightning_lm.protocols import Tokenizer

__all__ = ["add_arguments", "asked_tasks", "local_model", "run", "tasks_of"]

TAKES_SETTINGS = True  # those of lm-evaluation-harness
_SETTINGS = ("shots", "num_samples", "vote", "chain_of_thought")
_VOTES = ("none", "majority", "weighted", "best")
_DIGESTED = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*/*.jinja", "vocab.txt", "merges.txt")
"""Files of a folder that may change an answer: weights, settings, tokenizer and chat templates."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to a parser."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="compare A.json B.json",
        help="differences of two results on the same items, with intervals; or: harness, followed by the options of "
        "lm-evaluation-harness; or: judge, for answers that another model judges (evaluate judge --help)",
    )
    parser.add_argument("--list", action="store_true", help="show the tasks")
    parser.add_argument("--tasks", metavar="A,B", help="names of tasks, or a YAML file that lists them")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the tasks' published files")
    add_model_arguments(parser, required=False)
    model = parser.add_argument_group("the model")
    model.add_argument("--server", metavar="URL", help="a server with OpenAI's interface instead")
    model.add_argument("--model-name", default="default", metavar="NAME", help="name of the model on the server")
    model.add_argument("--chat", action="store_true", help="write prompts by the chat template")
    model.add_argument("--max-length", type=COUNT, metavar="N", help="tokens of the context (default: the model's)")
    model.add_argument("--batch-size", type=COUNT, default=32, metavar="N", help="rows of a pass (%(default)s)")
    tasks = parser.add_argument_group("how it is asked")
    tasks.add_argument("--shots", type=WHOLE, metavar="N", help="examples before each question")
    tasks.add_argument(
        "--samples", dest="num_samples", type=COUNT, metavar="N", help="completions of each question: pass@k, maj@k"
    )
    tasks.add_argument("--vote", choices=_VOTES, help="what stands for the task, of several samples")
    _add_reasoning_arguments(tasks)
    tasks.add_argument("--limit", type=COUNT, metavar="N", help="most items of a task, evenly spread over it")
    tasks.add_argument("--seed", type=WHOLE, default=0, metavar="N", help="of sampled completions (%(default)s)")
    output = parser.add_argument_group("results")
    output.add_argument("--output", type=Path, metavar="FILE", help="write JSON; a broken run goes on there")
    output.add_argument(
        "--contamination",
        type=Path,
        metavar="PATH",
        help="training text or token store in which items are looked for",
    )
    output.add_argument(
        "--ngram",
        type=COUNT,
        default=13,
        metavar="N",
        help="words in common that count there (%(default)s)",
    )
    output.add_argument("--curve", type=Path, metavar="FILE", help="draw accuracy against generated tokens")
    output.add_argument("--figure", type=Path, metavar="FILE", help="draw the scores")


def _add_reasoning_arguments(tasks: argparse._ArgumentGroup) -> None:
    tasks.add_argument(
        "--chain-of-thought", action="store_const", const=True, help="let the model reason before it answers"
    )
    tasks.add_argument(
        "--thinking-tokens", type=COUNT, nargs="+", default=[], metavar="N", help="budgets of reasoning, one or several"
    )
    tasks.add_argument(
        "--waits", type=WHOLE, default=0, metavar="N", help="times that reasoning which ends early is told to go on"
    )


def run(namespace: argparse.Namespace) -> int:
    """Carry out the verb and return the exit status.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        UsageError: If arguments are missing or do not fit together.
        LightningLMError: If the model or a task cannot be used.
    """
    if namespace.words[:1] == ["harness"]:  # as typed: it has options of the same names
        return _run_harness(shlex.split(namespace.command_line)[3:])
    if namespace.settings:
        raise UsageError(f"lightning-lm evaluate: unrecognized arguments: {' '.join(namespace.settings)}")
    if namespace.list:
        return _list()
    if namespace.words:
        return _compare(namespace.words)
    if namespace.tasks is None or (namespace.checkpoint is None) == (namespace.server is None):
        raise UsageError(
            "lightning-lm evaluate needs --tasks and one of --checkpoint and --server. `lightning-lm evaluate --list` "
            "shows the tasks."
        )
    tasks = asked_tasks(namespace)
    _evaluate(tasks, _server(namespace) if namespace.server else local_model(namespace, chat=namespace.chat), namespace)
    return 0


def asked_tasks(namespace: argparse.Namespace) -> "list[Task]":
    """Return the tasks as a command line asks them: with its settings, once for each budget of reasoning.

    Args:
        namespace: Parsed arguments of `add_arguments`.

    Raises:
        ConfigurationError: If a task is unknown, or a setting does not fit it.
        UsageError: If arguments do not fit together.
    """
    settings = {name: getattr(namespace, name) for name in _SETTINGS if getattr(namespace, name) is not None}
    return _with_budgets(tasks_of(namespace.tasks, namespace.data, settings), namespace)


def tasks_of(wanted: str, data: Path | None, settings: dict[str, Any]) -> "list[Task]":
    """Return the tasks that a command line names.

    Args:
        wanted: Names with commas between them, or the path of a YAML file.
        data: Folder of the published files.
        settings: Settings of every task, over those of the file.

    Raises:
        ConfigurationError: If a task is unknown, or a setting does not fit it.
    """
    found: list[Task] = []
    for name in filter(None, map(str.strip, wanted.split(","))):
        path = _file_of(name)
        found += [_task(name, data, settings)] if path is None else _tasks_of_file(path, data, settings)
    if not found:
        raise ConfigurationError(f"{wanted!r} names no task; `lightning-lm evaluate --list` shows them.")
    return found


def _with_budgets(tasks: "list[Task]", namespace: argparse.Namespace) -> "list[Task]":
    """Return the tasks once for each budget of reasoning, named by it; without budgets as they are."""
    if not namespace.thinking_tokens:
        if namespace.waits:
            raise UsageError("--waits lengthens reasoning up to a budget; name it: --thinking-tokens 512.")
        return tasks
    from lightning_lm.evals.reasoning import BudgetForcing
    from lightning_lm.evals.tasks.registry import configured

    budgets = [BudgetForcing(max_tokens=count, waits=namespace.waits) for count in namespace.thinking_tokens]
    return [
        configured(task, name=f"{task.name}@{budget.max_tokens}", reasoning=budget)
        for task in tasks
        for budget in budgets
    ]


def _file_of(name: str) -> Path | None:
    """Return the file of a word that is not the name of a task: a path, or a recipe such as ``evaluate/offline``."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    recipe = find_recipe(name) if name.removeprefix("recipes/").startswith(TASK_LISTS) else None
    return Path(name) if recipe is None and name.endswith((".yaml", ".yml")) else recipe


def _task(entry: Any, data: Path | None, settings: dict[str, Any], folder: Path = Path()) -> "Task":
    from lightning_lm.evals.tasks import by_name
    from lightning_lm.evals.tasks.registry import configured, task_from_settings

    own = {str(key): value for key, value in entry.items()} if isinstance(entry, dict) else {"task": entry}
    if "class_path" in own:
        task, own = task_from_settings(own, folder=folder), {}
    else:
        task = by_name(str(own.pop("task", None)))
    given = {} if data is None else {"data": data}
    return configured(task, **{**own, **given, **settings})


def _tasks_of_file(path: Path, data: Path | None, settings: dict[str, Any]) -> "list[Task]":
    """Return the tasks that a file lists, or the one that it describes."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no YAML: {error}") from error
    if isinstance(content, dict) and "tasks" not in content:
        return [_task(str(path), data, settings)]
    entries = content["tasks"] if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ConfigurationError(f"{path} must have a list of tasks under `tasks:`, by name or as {{task: NAME, ...}}.")
    return [_task(entry, data, settings, path.parent) for entry in entries]


def _list() -> int:
    from lightning_lm.evals.tasks import names

    known = names()
    width = max(map(len, known))
    print("\n".join(f"{name:<{width}}  {summary}" for name, summary in known.items()))
    return 0


def _compare(words: Sequence[str]) -> int:
    if words[0] != "compare" or len(words) != 3:
        raise UsageError("Use: lightning-lm evaluate compare A.json B.json")
    from rich.console import Console

    from lightning_lm.evals.report import comparison_table
    from lightning_lm.evals.results import Results, compare_results

    first, second = Results.load(words[1]), Results.load(words[2])
    Console(width=_width()).print(comparison_table(compare_results(first, second), first, second))
    return 0


def _evaluate(tasks: "list[Task]", model: "EvaluatedModel", namespace: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_lm.evals.report import results_table, save_figure
    from lightning_lm.evals.runner import evaluate_tasks

    results = evaluate_tasks(
        tasks,
        model,
        limit=namespace.limit,
        seed=namespace.seed,
        output=namespace.output,
        progress=sys.stderr.isatty(),
    )
    if namespace.contamination is not None:
        from lightning_lm.evals.contamination import with_contamination

        documents = _documents(namespace.contamination, getattr(model, "tokenizer", None))
        results = with_contamination(results, tasks, documents, ngram=namespace.ngram)
        if namespace.output is not None:
            results.save(namespace.output)
    Console(width=_width()).print(results_table(results))
    if namespace.output is not None:
        _responses_beside(namespace.output).unlink(missing_ok=True)  # the next run may ask other weights
        print(f"Results: {namespace.output} ({results.duration_s:.0f} s)")
    if namespace.curve is not None:
        from lightning_lm.evals.compute_curve import save_curve

        print(f"Curve: {save_curve(results, namespace.curve)}")
    if namespace.figure is not None:
        print(f"Figure: {save_figure(results, namespace.figure)}")


def _documents(path: Path, tokenizer: "Tokenizer | None") -> "Iterator[str]":
    """Return the texts of training documents: those of files, or of a token store, decoded."""
    from lightning_lm.data import TokenStore, as_source
    from lightning_lm.evals.contamination import store_documents

    if not (path / "meta.json").is_file():
        return iter(as_source(path).documents())
    if tokenizer is None:
        raise UsageError(f"{path} has tokens; name the tokenizer that they were written with: --tokenizer PATH.")
    return store_documents(TokenStore(path), tokenizer)


def _width() -> int | None:
    """Return the columns of a table: those of a terminal, 80 in a file."""
    return None if sys.stdout.isatty() else 80


def local_model(namespace: argparse.Namespace, *, chat: bool | None) -> "LocalModel":
    """Return the model of a checkpoint, described by its digest and that of its base.

    Args:
        namespace: Arguments of `add_model_arguments`, and ``batch_size`` and ``max_length``.
        chat: Write prompts by the chat template; ``None`` if the tokenizer has one.

    Raises:
        LightningLMError: If the checkpoint cannot be used.
    """
    from lightning_lm.evals.local_model import LocalModel
    from lightning_lm.modules import load_model

    generator = load_generator(namespace, load_model)
    assert generator.tokenizer is not None
    path = resolve_checkpoint(namespace.checkpoint)
    has_template = getattr(generator.tokenizer, "chat_template", None) is not None
    return LocalModel(
        generator.model,
        generator.tokenizer,
        batch_size=namespace.batch_size,
        max_length=namespace.max_length,
        chat=has_template if chat is None else chat,
        description={"checkpoint": str(path), "sha256": _digest(path), **_base(path, namespace.base)},
    )


def _base(path: Path, given: Path | None) -> dict[str, str]:
    """Return what identifies the model of adapters."""
    from lightning_lm.models.huggingface.peft_adapters import adapter_base, is_adapter_folder

    if not is_adapter_folder(path):
        return {}
    folder = adapter_base(path, given)
    return {"base": str(folder), "base_sha256": _digest(folder)}


def _server(namespace: argparse.Namespace) -> "EvaluatedModel":
    from lightning_lm.evals.server_model import CachedServer, ServerModel

    cache = None if namespace.output is None else _responses_beside(namespace.output)
    tokenizer: Tokenizer | None = None
    if namespace.tokenizer is not None:
        from lightning_lm.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(namespace.tokenizer)
    return ServerModel(
        CachedServer(namespace.server, cache=cache),
        namespace.model_name,
        tokenizer=tokenizer,
        max_length=namespace.max_length,
        chat=namespace.chat,
    )


def _responses_beside(output: Path) -> Path:
    """Return the file of a server's responses, which a broken run begins with again."""
    return output.with_name(f"{output.name}.responses")


def _digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint: of the file, or of a folder's weights and settings."""
    files = [path] if path.is_file() else sorted({file for glob in _DIGESTED for file in path.glob(glob)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() if path.is_dir() else b"")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _run_harness(words: Sequence[str]) -> int:
    from lightning_lm.evals.harness import run_harness
    from lightning_lm.modules import load_model

    run_harness(words, load_model)
    return 0
