"""A trained model for others: an OpenAI-compatible server with continuous batching, and a chat page."""

from lightning_lm.serving.engine import Engine
from lightning_lm.serving.request import (
    DoesNotFit,
    EngineStopped,
    GenerationFailed,
    GenerationRequest,
    OutOfMemory,
    QueueFull,
    TimedOut,
    TokenLogprob,
    Update,
)

__all__ = [
    "DoesNotFit",
    "Engine",
    "EngineStopped",
    "GenerationFailed",
    "GenerationRequest",
    "OutOfMemory",
    "QueueFull",
    "TimedOut",
    "TokenLogprob",
    "Update",
]
