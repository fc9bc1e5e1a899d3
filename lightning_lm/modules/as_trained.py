"""Settings that a model and its tokenizer take over from the training data, to be used as they were trained.

The chat template, the tokens that end a completion, and the directions in which a prompt is read.
"""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lm.data import ChatTemplate
from lightning_lm.data.post_training.chat_program import chat_program
from lightning_lm.models import add_end_ids, prompt_is_prefix, set_prompt_is_prefix
from lightning_lm.protocols import Tokenizer

__all__ = ["read_as_trained", "stop_where_trained", "with_trained_template"]


def with_trained_template(tokenizer: Any, datamodule: object) -> Any:
    """Return the tokenizer with the chat template of the training data, as checkpoints and exported folders carry it.

    Args:
        tokenizer: Returned as it is if the data has no template of its own.
        datamodule: Has the `data.ChatTemplate` as ``template``, or none.
    """
    template = getattr(datamodule, "template", None)
    if not isinstance(template, ChatTemplate) or not hasattr(tokenizer, "with_chat_template"):
        return tokenizer
    program = chat_program(template, tokenizer)
    return tokenizer if program is None else tokenizer.with_chat_template(program)


def stop_where_trained(model: nn.Module, tokenizer: Tokenizer | None, datamodule: object) -> None:
    """Let the tokens that end a completion in the training data end the model's generation.

    Args:
        model: Carries its `models.generation_settings`.
        tokenizer: Tokenizer of the data.
        datamodule: Has the `data.ChatTemplate` as ``template``, or none.
    """
    template = getattr(datamodule, "template", None)
    if tokenizer is not None and isinstance(template, ChatTemplate):
        add_end_ids(model, template.stop_ids(tokenizer), tokenizer)


def read_as_trained(model: nn.Module, datamodule: object) -> None:
    """Let generation read prompts in the directions in which training reads them.

    Args:
        model: Carries its `models.generation_settings`.
        datamodule: Has ``prompt_is_prefix``, true if its rows begin with prefixes; one without changes nothing.
    """
    value = getattr(datamodule, "prompt_is_prefix", None)
    if value is None or value == prompt_is_prefix(model):
        return
    if not value:
        rank_zero_warn(
            "The model has read prompts in both directions so far (prefix language modelling), and the rows of "
            f"{type(datamodule).__name__} have no prefixes: it is trained causally now, and will generate so."
        )
    set_prompt_is_prefix(model, value)
