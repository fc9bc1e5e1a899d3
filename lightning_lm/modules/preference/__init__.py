"""Parts of preference optimization: pairs of completions, and the reference that a policy is compared with."""

__all__: list[str] = []
