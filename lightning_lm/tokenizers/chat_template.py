"""Chat templates: Jinja programs that come with a tokenizer and turn a conversation into text."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning_lm.errors import TokenizerError

__all__ = ["Message", "render_chat_template"]

Message = Mapping[str, Any]
"""One turn of a conversation: ``role``, ``content``, and whatever else the template reads."""


def render_chat_template(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    """Return a conversation as text.

    Templates come from files of strangers, so they run in a sandbox: they can reach no Python objects and change none.

    Args:
        template: A Jinja template in the dialect of Hugging Face.
        messages: The turns of the conversation, in order.
        variables: What else the template may read, such as ``add_generation_prompt`` and ``bos_token``.

    Raises:
        TokenizerError: If the template is faulty, does something forbidden, or refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return str(_compiled(template).render(messages=list(messages), **variables))
    except (TemplateError, TypeError) as error:
        raise TokenizerError(f"The chat template cannot be applied: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Return a template ready to be rendered; compiling takes ten times as long as rendering a conversation."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
