"""Measurement of launch settings."""

__all__: list[str] = []
