"""Templates and expressions over the fields of a record: Jinja, in the sandbox of chat templates."""

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.tokenizers.template_sandbox import bounded, record_environment

__all__ = ["evaluate_expression", "render_record", "render_values", "template_fields"]


def render_record(template: str, record: Mapping[str, Any], name: str) -> str:
    """Return a record's text.

    Args:
        template: A Jinja template of its fields, such as ``Question: {{ question }}``.
        record: The fields.
        name: Name of the template, for messages.

    Raises:
        ConfigurationError: If the template is faulty.
        DataError: If the record lacks a field, or the template cannot be applied to it.
    """
    compiled, fields = _compiled(template, name)
    return str(_applied(lambda: compiled.render(record), fields, record, name))


def render_values(template: str, record: Mapping[str, Any], name: str) -> str:
    """Return a record's text without the words of the template itself, which every record shares.

    Args:
        template: A Jinja template of its fields.
        record: The fields.
        name: Name of the template, for messages.

    Raises:
        ConfigurationError: If the template is faulty.
        DataError: If the record lacks a field, or the template cannot be applied to it.
    """
    compiled, fields = _compiled(template, name, values_only=True)
    return " ".join(str(_applied(lambda: compiled.render(record), fields, record, name)).split())


def evaluate_expression(expression: str, record: Mapping[str, Any], name: str) -> Any:
    """Return the value of an expression over a record's fields.

    Args:
        expression: A Jinja expression, such as ``choices.label.index(answerKey)``.
        record: The fields.
        name: Name of the expression, for messages.

    Raises:
        ConfigurationError: If the expression is faulty.
        DataError: If the record lacks a field, or the expression cannot be applied to it.
    """
    compiled, fields = _compiled_expression(expression, name)
    return _applied(lambda: compiled(**record), fields, record, name)


def template_fields(template: str, name: str) -> frozenset[str]:
    """Return the fields that a template names.

    Args:
        template: A Jinja template.
        name: Name of the template, for messages.

    Raises:
        ConfigurationError: If the template is faulty.
    """
    return _compiled(template, name)[1]


def _applied(apply: Any, fields: frozenset[str], record: Mapping[str, Any], name: str) -> Any:
    missing = sorted(fields - record.keys())
    if missing:
        raise DataError(
            f"no field {', '.join(map(repr, missing))}, which {name!r} of the task needs; the record has "
            f"{', '.join(map(repr, record)) or 'no fields'}."
        )
    try:
        with bounded():
            return apply()
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{name!r} of the task cannot be written: {error or type(error).__name__}.") from error


@functools.lru_cache(maxsize=256)
def _compiled(template: str, name: str, *, values_only: bool = False) -> tuple[Any, frozenset[str]]:
    environment = record_environment()
    try:
        with bounded():
            tree = environment.parse(template)
            for output in tree.find_all(nodes.Output) if values_only else ():
                output.nodes = [
                    nodes.TemplateData("\n") if isinstance(node, nodes.TemplateData) else node for node in output.nodes
                ]
            return environment.from_string(tree), _fields(template)
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"{name}={template!r} of the task is no Jinja template: {error}.") from error


@functools.lru_cache(maxsize=256)
def _compiled_expression(expression: str, name: str) -> tuple[Any, frozenset[str]]:
    environment = record_environment()
    try:
        with bounded():
            compiled = environment.compile_expression(expression, undefined_to_none=False)
            return compiled, _fields(f"{{{{ {expression} }}}}")
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"{name}={expression!r} of the task is no Jinja expression: {error}.") from error


def _fields(template: str) -> frozenset[str]:
    environment = record_environment()
    names = meta.find_undeclared_variables(environment.parse(template))
    return frozenset(names - environment.globals.keys())
