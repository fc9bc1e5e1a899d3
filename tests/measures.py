"""Measures of the shape of the code, printed as a table: ``python tests/measures.py [CHECKOUT]``.

* The files that a reader opens, and how often the file changes when functions are read in the order in which they first
  run: at each call into another file, and at the return from it. One step of a recipe is run for this, as in
  ``test_reading_length.py``: for GRPO the rollout with rewards and advantages, then ``training_step`` to the loss.
* Files of each folder, imports between the files of a folder, and circles among imports.
* Lines of the median function; docstrings and arguments that begin with a clause ("What ..."), as in
  ``test_language.py``.
* Copies of a few idioms that have a place of their own.

Another checkout, such as a worktree of an earlier commit, is measured by its own code.
"""

import ast
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import yaml

HERE = Path(__file__).resolve()
CLAUSE = re.compile(r"(What|Which|How|Where|Whether|When|Who|Why|Of|Knows|Says|Tells|Chooses)\b")
COPIES = {
    "float64 unless on an Apple GPU": r'type [!=]= "mps"',
    "write, then rename": r"os\.(replace|rename)\(|\.rename\(|temporary\.replace\(",
    "fsync of a file": r"os\.fsync\(",
    "ranks that read different data": r'\["num_replicas"\]|get\("num_replicas"|\["rank"\]|get\("rank"',
    "cache folder": r'get\("XDG_CACHE_HOME"\)',
    "pool of processes": r"ProcessPoolExecutor\(",
    "lock": r"\.flock\(",
}
"""Idioms, each with an expression that finds a line of it."""
APART = {"grpo/reverse": ("models", "generation", "tokenizers"), "dpo/reverse": ("models",), "pretrain/quickstart": ()}
"""Recipes, and the packages that are read apart."""


def sources(root: Path) -> list[Path]:
    folders = ("lightning_lm", "callbacks", "strategies")
    return sorted(path for name in folders for path in (root / name).rglob("*.py"))


# --- the order of reading ---


class Reading:
    """Functions in the order in which they first run, with the files that a reader turns to for them."""

    def __init__(self, package: Path, apart: tuple[str, ...]) -> None:
        self.package, self.apart = package, apart
        self.codes: set[CodeType] = set()
        self.files: set[str] = set()
        self.now: str | None = None
        self.changes = self.with_returns = 0

    def folder_of(self, code: CodeType) -> str | None:
        path = Path(code.co_filename)
        return path.relative_to(self.package).parts[0] if path.is_relative_to(self.package) else None

    def caller_of(self, frame: FrameType) -> FrameType | None:
        """Return the frame of ours that called; ``None`` at the outermost, or inside what is read apart."""
        above = frame.f_back
        while above is not None and "/lightning/pytorch/" not in above.f_code.co_filename:
            if self.folder_of(above.f_code) is not None:
                return above
            above = above.f_back
        return None

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code in self.codes or code.co_name.startswith("<"):
            return
        if self.folder_of(code) is None or self._is_apart(frame):
            return
        self.codes.add(code)
        self.files.add(code.co_filename)
        caller = self.caller_of(frame)
        back = self.now if caller is None else caller.f_code.co_filename
        self.with_returns += (back != self.now) + (code.co_filename != back) if self.now else 0
        self.changes += self.now not in (None, code.co_filename)
        self.now = code.co_filename

    def _is_apart(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if self.folder_of(frame.f_code) in self.apart:
                return True
            frame = self.caller_of(frame)
        return False


def trace(recipe: str) -> None:
    """Run a step of a recipe with a tiny model, and print its files and the changes between them."""
    import threading

    from lightning.pytorch import Callback

    import lightning_lm
    from lightning_lm.cli import main

    package = Path(lightning_lm.__file__).parent
    rollout, step = Reading(package, APART[recipe]), Reading(package, APART[recipe])

    def follow(note):
        sys.setprofile(note)
        threading.setprofile(note)

    class Trace(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            follow(rollout.note if recipe.startswith("grpo") else None)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            follow(step.note)

        def on_before_backward(self, trainer, pl_module, loss):
            follow(None)
            for name, reading in (("fetch of a rollout", rollout), ("training_step to the loss", step)):
                files = sorted(str(Path(file).relative_to(package)) for file in reading.files)
                print("TRACED", f"{recipe}, {name};", len(files), reading.changes, reading.with_returns, *files)

    sys.modules["traced"] = type(sys)("traced")
    sys.modules["traced"].Trace = Trace
    Trace.__module__, Trace.__qualname__ = "traced", "Trace"
    Path("corpus.txt").write_text("def main():\n    return 'the loss'\n" * 400)
    Path("tiny.yaml").write_text(yaml.safe_dump(overlay(recipe)))
    main(["fit", "--config", "tiny.yaml"])


def overlay(recipe: str) -> dict:
    """Return settings that keep a recipe's parts and make the model small."""
    sizes = {"d_model": 16, "num_layers": 1, "context_length": 32}
    trainer = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "logger": False}
    trainer |= {"enable_checkpointing": False, "callbacks": [{"class_path": "traced.Trace"}]}
    if recipe.startswith("pretrain"):
        train = {"train": "corpus.txt", "context_length": 32, "tokenizer": {"init_args": {"vocab_size": 300}}}
        return {"base": recipe, "trainer": trainer, "model": {"model": sizes}, "data": train}
    model = {"model": {"class_path": "TransformerConfig", "init_args": sizes}}
    data = {"tokenizer": {"class_path": "TrainCharacters"}}
    return {"base": recipe, "trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}


def print_reading(root: Path, verbose: bool) -> None:
    print("\nreading                                         files   changes of file   with returns")
    for recipe in APART:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "PYTHONPATH": str(root), "XDG_CACHE_HOME": folder}
            command = [sys.executable, "-P", str(HERE), "--trace", recipe]
            ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        found = re.findall(r"^TRACED (.*); (\d+) (\d+) (\d+)(.*)$", ran.stdout, re.MULTILINE)
        if not found:
            sys.exit(f"{recipe} did not run:\n{ran.stdout[-500:]}{ran.stderr[-3000:]}")
        for name, files, changes, with_returns, names in found:
            if names:
                print(f"  {name:45} {files:>6} {changes:>17} {with_returns:>14}")
            for file in names.split() if verbose else ():
                print(f"    {file}")


# --- folders and imports ---


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts if parts[0] == "lightning_lm" else ("lightning_lm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that a file imports when it is loaded."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            place = stack.index(node)
            members, stack[place:] = stack[place:], []
            if len(members) > 1:
                found.append(sorted(members))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def print_folders(root: Path) -> None:
    modules = {module_of(path, root): path for path in sources(root)}
    graph = {
        name: {target for target in imports_of(path, modules) if target in modules and target != name}
        for name, path in modules.items()
    }
    print("\nfolder                                          files   lines   imports inside")
    folders: defaultdict[Path, list[str]] = defaultdict(list)
    for name, path in modules.items():
        folders[path.parent].append(name)
    for folder, names in sorted(folders.items()):
        here = {name for name in names if modules[name].stem != "__init__"}
        inside = sum(len(graph[name] & here) for name in here)
        lines = sum(len(modules[name].read_text().splitlines()) for name in names)
        print(f"  {folder.relative_to(root)!s:45} {len(here):5} {lines:7} {inside:10}")
    lines = sum(len(path.read_text().splitlines()) for path in modules.values())
    print(f"  {'all':45} {len(modules):5} {lines:7} {sum(map(len, graph.values())):10}")
    files = {name: targets for name, targets in graph.items() if modules[name].stem != "__init__"}
    print(f"circles of files: {circles(files) or 'none'}")
    print(f"circles of folders: {circles(_between_folders(graph, modules)) or 'none'}")


def _between_folders(graph: dict[str, set[str]], modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return the imports between the packages, apart from those of the files that list what a package exports."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        for target in targets if modules[name].stem != "__init__" else ():
            first, second = (".".join(module.split(".")[:2]) for module in (name, target))
            if first != second:
                found[first].add(second)
    return found


# --- functions, words, copies ---


def texts(tree: ast.Module) -> Iterator[str]:
    """Yield each docstring and each argument's text."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield docstring
            arguments = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
            yield from re.findall(r"^ {4}\*{0,2}\w+: (.*)", arguments[1], re.MULTILINE) if arguments else ()


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def print_functions(root: Path) -> None:
    trees = [ast.parse(path.read_text()) for path in sources(root)]
    functions = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = [body_lines(node) for node in functions]
    print(f"\nfunctions: {len(sizes)}, median {statistics.median(sizes):g} lines, longest {max(sizes)}")
    found = [text for tree in trees for text in texts(tree)]
    retired = sum(CLAUSE.match(text) is not None for text in found)
    print(f"docstrings and arguments: {len(found)}, {retired} ({retired / len(found):.1%}) begin with a clause")


def print_copies(root: Path) -> None:
    print("\nidiom                                           places")
    for name, pattern in COPIES.items():
        hits = [
            (path, line) for path in sources(root) for line in path.read_text().splitlines() if re.search(pattern, line)
        ]
        print(f"  {name:45} {len(hits):6}   in {len({path for path, _ in hits})} files")


def measure(root: Path, verbose: bool) -> None:
    print(f"{root.name}: {subprocess.check_output(['git', 'describe', '--always'], cwd=root, text=True).strip()}")
    print_reading(root, verbose)
    print_folders(root)
    print_functions(root)
    print_copies(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        trace(sys.argv[2])
    else:
        named = [word for word in sys.argv[1:] if not word.startswith("-")]
        measure(Path(named[0] if named else HERE.parents[1]).resolve(), "-v" in sys.argv)
