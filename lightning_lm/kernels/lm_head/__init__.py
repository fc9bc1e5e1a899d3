"""Losses and log-probabilities straight from the features of the output layer, without a matrix of all logits."""

__all__: list[str] = []
