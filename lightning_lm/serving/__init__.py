"""An OpenAI-compatible server with continuous batching, and a chat page."""

__all__: list[str] = []
