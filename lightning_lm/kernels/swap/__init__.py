"""Swap of the methods of a model's layers by kernels."""

__all__: list[str] = []
