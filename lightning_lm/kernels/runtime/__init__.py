"""Everything between a kernel and its callers: choice of the backend, launches, their settings, operators and FLOPs."""

__all__: list[str] = []
