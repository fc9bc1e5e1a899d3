"""Checkpoints of strategies: single files, folders that ranks write together, and writing while training goes on."""

__all__: list[str] = []
