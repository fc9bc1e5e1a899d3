"""Fits of scaling laws, from finished runs to laws with intervals."""

__all__: list[str] = []
