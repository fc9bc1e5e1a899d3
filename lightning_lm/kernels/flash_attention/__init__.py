"""FlashAttention-2: its Triton kernels, and the differentiable operation around them."""

__all__: list[str] = []
