"""Linear recurrences on a GPU: the state of each head passes all chunks in one kernel."""

__all__: list[str] = []
