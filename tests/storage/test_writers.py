"""Every call of the package that writes a file goes through `storage`, or is known here with the reason why not."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lightning_lm", "callbacks", "strategies")
ATOMIC = {"replacing", "replacing_checkpoint", "filling", "synced"}
"""Blocks in which a file or folder is written beside its place, which it takes when all is on the disk."""
WRITING = {
    *("write_text", "write_bytes", "savefig", "save_file", "savez", "to_csv", "to_parquet", "tofile"),
    *("copyfile", "copytree", "copy2", "extractall", "export_chrome_trace", "save_pretrained", "rename", "symlink_to"),
    *("hardlink_to", "writestr", "SummaryWriter", "ParquetWriter", "touch"),
}
"""Methods and functions that put something on a disk whatever they belong to."""
OF_MODULES = {
    *(("np", "save"), ("torch", "save"), ("os", "replace"), ("os", "link"), ("os", "symlink"), ("shutil", "move")),
    *(("json", "dump"), ("yaml", "dump"), ("pickle", "dump")),
}

UNIT = "into the folder of a task, which gets its name when all is written"
PIPE = "into a pipe or a device"
BOX = "into the folder of a program in the sandbox, which nobody reads after it"
KNOWN = {
    ("callbacks/profile.py", "Profile._record"): "a trace to look at, which torch writes by its name",
    ("lightning_lm/cli/road/drive.py", "Drive._measure"): "marks a finished measurement by a name",
    ("lightning_lm/cli/road/process.py", "run_process"): "a log, which grows",
    ("lightning_lm/cli/run_folder.py", "_write"): "gives an older config another name",
    ("lightning_lm/cli/sweep.py", "_own_process"): "a log, which grows",
    ("lightning_lm/curation/execution/output.py", "_link"): UNIT,
    ("lightning_lm/curation/execution/output.py", "write_output"): UNIT,
    ("lightning_lm/curation/execution/runs.py", "RunWriter.flush"): UNIT,
    ("lightning_lm/curation/execution/stages.py", "ShardTask._run"): UNIT,
    ("lightning_lm/curation/execution/stages.py", "TaskResult.write"): UNIT,
    ("lightning_lm/curation/execution/stages.py", "_new_folder.__exit__"): "gives such a folder its name",
    ("lightning_lm/data/post_training/supervised.py", "store_examples"): "gives a folder its name",
    ("lightning_lm/data/tokenize.py", "_Job.run"): "gives a folder its name",
    ("lightning_lm/data/tokens.py", "_written"): "gives a folder its name",
    ("lightning_lm/evals/response_cache.py", "ResponseCache.put"): "one line at its end; a cut line is asked for again",
    ("lightning_lm/models/gguf/file.py", "put_digest"): "into the temporary file of `replacing`",
    ("lightning_lm/models/huggingface/folder.py", "_save_transformers"): "into the folder of `filling`",
    ("lightning_lm/models/huggingface/weights.py", "_save"): "into the folder of `filling`",
    ("lightning_lm/rewards/answer_worker.py", "_prepare"): PIPE,
    ("lightning_lm/rewards/sandbox.py", "Sandbox._run"): BOX,
    ("lightning_lm/rewards/sandbox.py", "Sandbox._start"): BOX,
    ("lightning_lm/rewards/sandbox_child.py", "_own_root"): BOX,
    ("lightning_lm/rewards/sandbox_child.py", "_separate"): PIPE,
    ("lightning_lm/scaling/ledger.py", "RunLedger._locked"): "one line at the end of a locked file",
    ("lightning_lm/tokenizers/word_count_process.py", "_main"): PIPE,
    ("lightning_lm/tokenizers/word_counts.py", "_Processes._send"): PIPE,
    ("strategies/checkpoints/sharded.py", "_loadable"): "into memory",
    ("strategies/checkpoints/sharded.py", "put"): "puts a folder of shards in the place of another",
    ("strategies/checkpoints/sharded.py", "remove"): "hides a folder before it is removed",
}
"""Functions that write in other ways, by file, and why."""


def writes(call: ast.Call) -> bool:
    """Return whether a call writes into a file, or moves one."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "open":
        words = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        texts = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        flags = {word.attr for word in ast.walk(call) if isinstance(word, ast.Attribute)}
        modes = [text for text in texts if set(text) <= set("rwaxbt+")]
        return bool(flags & {"O_WRONLY", "O_RDWR"}) or any(set(mode) & set("wax+") for mode in modes)
    owner = function.value if isinstance(function, ast.Attribute) else None
    return name in WRITING or (isinstance(owner, ast.Name) and (owner.id, name) in OF_MODULES)


class Calls(ast.NodeVisitor):
    """Collects the functions with calls that write outside of a block of `storage`."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._functions: list[str] = []
        self._atomic = 0

    def visit(self, node: ast.AST) -> None:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        self._functions += [node.name] if named else []
        super().visit(node)
        self._functions = self._functions[:-1] if named else self._functions

    def visit_With(self, node: ast.With) -> None:
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        names = {
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls
        }
        self._atomic += bool(names & ATOMIC)
        self.generic_visit(node)
        self._atomic -= bool(names & ATOMIC)

    def visit_Call(self, node: ast.Call) -> None:
        if writes(node) and not self._atomic:
            self.found.add(".".join(self._functions))
        self.generic_visit(node)


def found_in(text: str) -> set[str]:
    calls = Calls()
    calls.visit(ast.parse(text))
    return calls.found


def every_writer() -> set[tuple[str, str]]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    inside = {path: path.relative_to(ROOT).as_posix() for path in files}
    return {
        (name, function)
        for path, name in inside.items()
        if not name.startswith("lightning_lm/storage/")
        for function in found_in(path.read_text(encoding="utf-8"))
    }


def test_every_writer_goes_through_storage_or_says_why_not():
    assert sorted(every_writer()) == sorted(KNOWN)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("path.write_text('x')", True),
        ("open(path, 'w')", True),
        ("path.open(mode='ab')", True),
        ("os.open(path, os.O_RDWR | os.O_CREAT)", True),
        ("np.save(path, array)", True),
        ("with path.open('wb') as file: file.write(b'')", True),
        ("with replacing(path) as file: torch.save(content, file)", False),
        ("with naming(path), storage.synced(path) as file: torch.save(content, file)", False),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("text.replace('a', 'b')", False),
    ],
)
def test_what_writes_is_recognised(text, is_found):
    assert bool(found_in(text)) == is_found
