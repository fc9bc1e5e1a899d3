"""Checkpoints of strategies: single files, folders that ranks write together, and writing while training continues."""

__all__: list[str] = []
