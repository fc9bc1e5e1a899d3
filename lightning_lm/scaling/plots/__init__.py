"""Figures of scaling studies."""

__all__: list[str] = []
