"""A trained model for others: an OpenAI-compatible server with continuous batching, and a chat page."""

from lightning_lm.serving.engine import Engine
from lightning_lm.serving.request import EngineStopped, GenerationRequest, QueueFull, TimedOut, TokenLogprob, Update

__all__ = ["Engine", "EngineStopped", "GenerationRequest", "QueueFull", "TimedOut", "TokenLogprob", "Update"]
