"""Tensor parallel and fully sharded training of any LightningModule."""

__all__: list[str] = []
