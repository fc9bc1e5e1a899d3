"""Models, configurations, adapters and weights in the formats of Hugging Face, read and written."""

__all__: list[str] = []
