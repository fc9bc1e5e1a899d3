"""Running a pipeline on one machine: processes over shards, with results on disk that a later run finds again."""

__all__: list[str] = []
