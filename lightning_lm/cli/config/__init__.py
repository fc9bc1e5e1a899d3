"""YAML configurations of the command line: overlays, defaults, checks, and errors that a person can read."""

__all__: list[str] = []
