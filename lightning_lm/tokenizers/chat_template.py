"""Chat templates: Jinja programs that come with a tokenizer and turn a conversation into text.

They are run as transformers runs them: the same extensions (``{% generation %}``, ``{% break %}``), filters, functions
and variables. They are files of strangers, so they run in a sandbox with bounded time and memory (`template_sandbox`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lm.errors import MissingDependencyError, TokenizerError

__all__ = ["Message", "render_chat_template"]

Message = Mapping[str, Any]
"""One turn of a conversation: ``role``, ``content``, and whatever else the template reads."""


def render_chat_template(
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    generation_marks: tuple[str, str] | None = None,
) -> str:
    """Return a conversation as text.

    Args:
        template: A Jinja template in the dialect of Hugging Face.
        messages: The turns of the conversation, in order.
        variables: Further variables of the template, such as ``add_generation_prompt`` and ``bos_token``. ``tools`` and
            ``documents`` are ``None`` by default.
        generation_marks: Written before and after the body of each ``{% generation %}`` block; by default nothing is.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
        TokenizerError: If the template is faulty, does something forbidden, takes too much time or memory, or refuses
            the conversation.
    """
    try:
        from jinja2 import TemplateError

        from lightning_lm.tokenizers.template_sandbox import GENERATION_MARKS, bounded, compiled
    except ImportError as error:
        raise MissingDependencyError("jinja2", "render a chat template", "hf") from error

    given = {"tools": None, "documents": None, **variables, "messages": list(messages)}
    try:
        with bounded():
            return str(compiled(template).render({**given, GENERATION_MARKS: generation_marks}))
    except RecursionError as error:
        raise TokenizerError(
            "The chat template cannot be applied: it is nested too deeply, or a macro calls itself without an end."
        ) from error
    except (TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError) as error:
        raise TokenizerError(f"The chat template cannot be applied: {_reason(error)}") from error
    except (SyntaxError, TypeError, ValueError) as error:
        raise TokenizerError(f"The chat template cannot be applied: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
