"""Data of post-training: conversations, preferences and prompts, from records to rows of tokens."""

__all__: list[str] = []
