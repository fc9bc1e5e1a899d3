"""The Jinja program of a chat template, for the tokenizer of a trained model to carry: others read no parts of ours."""

import json

from lightning_lm.data.post_training.chat import ChatML, ChatTemplate, begin_ids
from lightning_lm.protocols import Tokenizer

__all__ = ["chat_program"]


def chat_program(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """Return the Jinja program that writes the same conversations as a template.

    Args:
        template: Chat template of the training data. One with a method ``program`` provides it itself.
        tokenizer: Names the special tokens.

    Returns:
        ``None`` if the tokenizer keeps the template that it has.
    """
    own = getattr(template, "program", None)
    if own is not None:
        program: str | None = own(tokenizer)
        return program
    return _chatml(template, tokenizer) if isinstance(template, ChatML) else None


def _chatml(template: ChatML, tokenizer: Tokenizer) -> str:
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    begin = "".join(names.get(token) or tokenizer.decode([token]) for token in begin_ids(tokenizer))
    start, end = json.dumps(template.start), json.dumps(template.end)
    text = "message.content if message.content is string else message.content | map(attribute='text') | join"
    return (
        f"{{{{- {json.dumps(begin)} -}}}}"
        f"{{%- for message in messages -%}}{{%- set said = {text} -%}}"
        f"{{{{- {start} + message.role + '\\n' + said + {end} + '\\n' -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {start} + 'assistant\\n' -}}}}{{%- endif -%}}"
    )
