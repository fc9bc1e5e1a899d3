"""The sandbox of chat templates: no Python objects in reach, and bounded time and memory.

Jinja's own sandbox forbids attributes and changes. What is added: each turn of a loop and each call of a macro is
counted, and the size of each text is known before it is made, so neither ``'x' * 3000000000`` nor a loop that doubles
a text can fill the memory.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["GENERATION_MARKS", "bounded", "compiled", "record_environment"]

GENERATION_MARKS = "_generation_marks"
"""Variable of the two texts that are written around ``{% generation %}`` blocks, or of None."""

_MAX_CPU_S = 10.0
_MAX_TEXT = 50_000_000
"""Characters of one text."""
_MAX_TOTAL = 1_000_000_000
"""Characters of all texts that are put together for one conversation."""
_MAX_NUMBER = 1_000_000
"""Width, count or step that a function may be given."""


class _Budget:
    """Time and memory that one rendering has used."""

    def __init__(self) -> None:
        self._steps, self._total, self._end_s = 0, 0, time.thread_time() + _MAX_CPU_S

    def step(self) -> None:
        self._steps += 1
        if self._steps % 16 == 0 and time.thread_time() > self._end_s:
            raise ValueError(f"it runs for more than {_MAX_CPU_S:.0f} s. Look for loops inside loops.")

    def write(self, size: int) -> None:
        self._total += size
        if size > _MAX_TEXT or self._total > _MAX_TOTAL:
            raise ValueError(
                f"it writes texts of more than {_MAX_TEXT:,} characters, or {_MAX_TOTAL:,} in all. Look for repeated "
                "or doubled texts."
            )


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("_budget")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the time and memory of the templates that are compiled and rendered within."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> Template:
    """Return a template ready to be rendered; compiling takes ten times as long as rendering a conversation.

    Args:
        template: A Jinja template.
    """
    return _environment().from_string(template)


class _Generation(Extension):
    """``{% generation %}``: the block around the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @pass_context
    def mark(self, context: Any, caller: Any) -> str:
        begin, end = context.get(GENERATION_MARKS) or ("", "")
        return f"{begin}{caller()}{end}"


class _Counted(NodeTransformer):
    """Counts each turn of a loop and each call of a macro, and has texts joined by ``~`` measured first."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        tree.set_lineno(1)
        return tree

    def step(self) -> None:
        _budget.get().step()

    def joined(self, *parts: Any) -> str:
        _budget.get().write(_size(parts))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().write(_size_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        function = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            args = tuple(_materialised(item) for item in args)
            _budget.get().write(_size_of_text_function(name, owner, args, kwargs))
        return super().call(__context, __obj, *args, **kwargs)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_measured
    )
    filters = {**environment.filters, "tojson": _to_json}
    environment.filters = {name: _bounded_filter(name, function) for name, function in filters.items()}
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    del environment.globals["lipsum"]
    return environment


@functools.cache
def record_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment of templates that write a record: a name that it lacks is an error, line breaks stay."""
    environment = _environment().overlay(
        undefined=StrictUndefined, trim_blocks=False, lstrip_blocks=False, keep_trailing_newline=True
    )
    assert isinstance(environment, _Environment)
    return environment


def _size(value: Any) -> int:
    """Return about how many characters a value has as text, counting no further than the limit."""
    size, waiting = 0, [value]
    while waiting and size <= _MAX_TEXT:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item) + 48
        elif isinstance(item, Mapping):
            waiting.extend(item.keys())
            waiting.extend(item.values())
            size += 48
        elif isinstance(item, list | tuple):
            waiting.extend(item)
            size += 48
        else:
            size += 48
    return size


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    texts = (str, list, tuple)
    if operator == "%" and isinstance(left, str):
        return _size_of_format(left, right)
    if operator == "+" and isinstance(left, texts) and isinstance(right, texts):
        return len(left) + len(right)
    if operator == "*" and isinstance(left, (*texts, int)) and isinstance(right, (*texts, int)):
        counts = [len(side) if isinstance(side, texts) else abs(side) for side in (left, right)]
        if isinstance(left, int) and isinstance(right, int):
            return left.bit_length() + right.bit_length()
        return counts[0] * counts[1]
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right)
    return 0


def _size_of_format(layout: str, given: Any) -> int:
    """Return how long a text becomes whose gaps are filled; a width may stand in it, or be given with ``*``."""
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", layout)]
    if "*" in layout or "{" in layout:
        widths += (
            [abs(number) for number in _numbers(given)] if "*" in layout or re.search(r"\{[^}]*\{", layout) else []
        )
    return len(layout) + _size(given) * (1 + layout.count("{") + layout.count("%")) + sum(widths)


def _numbers(value: Any) -> list[int]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    flat = [number for item in values for number in (item if isinstance(item, list | tuple) else [item])]
    return [number for number in flat if isinstance(number, int)]


def _size_of_text_function(name: str, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return a bound of how long the result is when a function of a text is called."""
    if name in ("format", "format_map"):
        return _size_of_format(text, [*args, *kwargs.values()])
    _check_numbers([*args, *kwargs.values()])
    if name == "join" and args:
        return _size(args[0]) + len(text) * len(args[0])
    if name == "replace" and len(args) >= 2 and isinstance(args[1], str):
        return len(text) + (text.count(str(args[0])) if args[0] else len(text) + 1) * len(args[1])
    if name == "expandtabs":
        return len(text) + text.count("\t") * (_numbers([*args, 8])[0])
    return len(text)


def _check_numbers(values: Sequence[Any]) -> None:
    for number in values:
        if isinstance(number, int) and abs(number) > _MAX_NUMBER:
            raise ValueError(f"a function is given the number {number:,}; the most is {_MAX_NUMBER:,}.")


_TEXT_FILTERS = {"join", "string", "tojson", "pprint", "xmlattr", "urlencode", "urlize", "e", "escape", "sum"}


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that checks its arguments first."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        context, given = args[:first], [_materialised(item) for item in args[first:]]
        if name == "format":
            size = _size_of_format(str(given[0]), [*given[1:], *kwargs.values()])
        else:
            _check_numbers([*given[1:], *kwargs.values()])
            size = _size_of_filter(name, given, kwargs)
        _budget.get().step()
        _budget.get().write(size)
        return function(*context, *given, **kwargs)

    return bounded


def _size_of_filter(name: str, given: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    value = given[0] if given else None
    if name in ("replace", "join") and value is not None:
        text, others = (str(value), given[1:]) if name == "replace" else (str((*given, "")[1]), [value])
        sized = others if name == "replace" or hasattr(value, "__len__") else [[]]
        return _size_of_text_function(name, text, sized, {}) + _size(list(kwargs.values())) * (1 + _length(value))
    if name == "indent" and isinstance(value, str):
        width = (_numbers([*given[1:2], *kwargs.values()]) or [4])[0]
        return len(value) + (1 + value.count("\n")) * max(width, _size(list(given[1:])))
    return _size(value) if name in _TEXT_FILTERS or isinstance(value, str) else 0


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _materialised(value: Any) -> Any:
    """Return the items of an iterator as a list, so that it can be looked at before it is used."""
    return list(value) if hasattr(value, "__next__") else value


def _measured(value: Any) -> Any:
    if not isinstance(value, str):
        budget = _budget.get(None)
        if budget is not None:
            budget.write(_size(value))
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
