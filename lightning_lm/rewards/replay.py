"""Tests of a program, judged in a process that the program is not in.

The tests run twice. Beside the program, each call of one of its functions records the plain value that came back, or
the name of the exception, and asserts decide nothing. In a second process, without the program, the same tests run with
the recorded values in place of the calls, and there the asserts count. An object that equals everything, a replaced
``sorted`` or a printed verdict therefore do not help a program.
"""

import ast
import builtins
import json

__all__ = ["can_replay", "recording_program", "scoring_program"]

_BUILTINS = frozenset(dir(builtins))

_RECORD = """
def _prepare():
    import json, builtins
    from sys import stdout
    saved, records = dict(vars(builtins)), []
    kinds = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
    def plain(value, depth=0, type=type, len=len, str=str, list=list, dict=dict):
        kind = type(value)
        if depth > 50:
            return ["opaque"]
        if value is None or kind in (bool, int, float, str):
            return ["value", value]
        if kind in kinds:
            return [kinds[kind], [plain(item, depth + 1) for item in list(value)]]
        if kind.__name__ in ("dict", "OrderedDict", "Counter", "defaultdict") and dict in kind.__mro__:
            return ["dict", [[plain(k, depth + 1), plain(v, depth + 1)] for k, v in list(dict.items(value))]]
        if kind in (bytes, bytearray):
            return ["bytes", bytes(value).hex()]
        return ["opaque"]
    def record(call, objects):
        try:
            value = call()
            kept = list(value) if type(value).__name__ in ("generator", "map", "filter", "zip", "range") else value
            records.append([plain(kept), None, [plain(item) for item in objects()]])
            return kept
        except Exception as error:
            records.append([None, type(error).__name__, []])
            raise
    def finish(write=stdout.write, flush=stdout.flush, dumps=json.dumps, newline=chr(10)):
        write(newline + dumps(records) + newline)
        flush()
    return saved, record, finish
_saved, _record, _finish = _prepare()
_scope = {"__name__": "__main__"}
exec(compile(PROGRAM, "program.py", "exec"), _scope)
for _name in SHADOWED:
    _scope.pop(_name, None)
_scope.update(__builtins__=_saved, __record__=_record)
try:
    exec(compile(TESTS, "tests.py", "exec"), _scope)
finally:
    _finish()
"""

_JUDGE = """
import builtins, json
_records = iter(json.loads(RECORDS))
class _Opaque:
    __hash__ = object.__hash__
def _read(value):
    kind, *content = value
    if kind == "opaque":
        return _Opaque()
    if kind == "value":
        return content[0]
    if kind == "bytes":
        return bytes.fromhex(content[0])
    if kind == "dict":
        return {_read(key): _read(item) for key, item in content[0]}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_read, content[0]))
def _replay(*objects):
    value, error, changed = next(_records)
    for old, new in zip(objects, map(_read, changed)):
        if type(old) is type(new) and type(old) in (list, dict, set):
            old.clear()
            (old.extend if type(old) is list else old.update)(new)
    if error is not None:
        found = getattr(builtins, error, Exception)
        raise (found if isinstance(found, type) and issubclass(found, Exception) else Exception)()
    return _read(value)
_scope = {"__name__": "__main__", "__replay__": _replay, **dict.fromkeys(NAMES)}
exec(compile(TESTS, "tests.py", "exec"), _scope)
print("passed")
"""


class _Names(ast.NodeVisitor):
    """The names that tests define themselves, those that they import, and those that they read."""

    def __init__(self, tree: ast.AST) -> None:
        self.functions: set[str] = set()
        self.imported: set[str] = set()
        self.assigned: set[str] = set()
        self.read: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.functions.add(node.name)
            elif isinstance(node, ast.alias):
                self.imported.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.arg):
                self.assigned.add(node.arg)
            elif isinstance(node, ast.Name):
                (self.read if isinstance(node.ctx, ast.Load) else self.assigned).add(node.id)
        unknown = self.read - self.functions - self.imported - self.assigned
        # A program may be asked for a function that is called like a builtin, such as "sum", and for nothing else.
        self.program = unknown - _BUILTINS or unknown


class _Calls(ast.NodeTransformer):
    """Replaces each call of the program by a record of its value, or by the recorded value."""

    def __init__(self, names: _Names, *, replay: bool) -> None:
        self._names, self._replay = names, replay

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.generic_visit(node)
        return node if self._replay else ast.Expr(node.test)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function, names = node.func, self._names
        called = isinstance(function, ast.Name) and function.id in names.program | (names.assigned - names.functions)
        if not called:
            return self.generic_visit(node)
        arguments = [argument for argument in node.args if isinstance(argument, ast.Name)]
        objects: list[ast.expr] = [ast.Name(argument.id, ast.Load()) for argument in arguments]
        if self._replay:
            return ast.Call(ast.Name("__replay__", ast.Load()), objects, [])
        empty = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        recorded: list[ast.expr] = [ast.Lambda(empty, node), ast.Lambda(empty, ast.Tuple(objects, ast.Load()))]
        return ast.Call(ast.Name("__record__", ast.Load()), recorded, [])


def can_replay(tests: str) -> bool:
    """Tell whether tests can run without the program: they make no objects of its classes.

    Args:
        tests: Python code.
    """
    try:
        tree = ast.parse(tests)
    except SyntaxError:
        return False
    names = _Names(tree)
    classes = {name for name in names.program if name[:1].isupper()}
    attributes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    foreign = names.program | names.assigned
    return not classes and not any(isinstance(value, ast.Name) and value.id in foreign for value in attributes)


def recording_program(program: str, tests: str) -> str:
    """Return a program that runs tests beside another program and prints what its functions returned.

    Args:
        program: The program of a completion.
        tests: Python code.
    """
    names = _Names(ast.parse(tests))
    source = ast.unparse(ast.fix_missing_locations(_Calls(names, replay=False).visit(ast.parse(tests))))
    shadowed = sorted(_BUILTINS - names.program)
    return f"PROGRAM, TESTS, SHADOWED = {program!r}, {source!r}, {shadowed!r}\n{_RECORD}"


def scoring_program(records: str, tests: str) -> str:
    """Return the program that runs the tests on recorded values and ends without an error if they pass.

    Args:
        records: The last line that `recording_program` printed.
        tests: Python code.
    """
    names = _Names(ast.parse(tests))
    json.loads(records)
    source = ast.unparse(ast.fix_missing_locations(_Calls(names, replay=True).visit(ast.parse(tests))))
    wanted = sorted(names.program - _BUILTINS)
    return f"RECORDS, TESTS, NAMES = {records!r}, {source!r}, {wanted!r}\n{_JUDGE}"
