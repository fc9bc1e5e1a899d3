"""A problem whose noise scale is known: examples around a mean, and a parameter that stays where it is."""

import torch
from lightning.pytorch import LightningModule

DIM, SIGMA, DISTANCE = 24, 1.5, 2.0
NOISE_SCALE = DIM * SIGMA**2 / DISTANCE**2
"""Trace of the covariance over the squared gradient, in examples."""


class Quadratic(LightningModule):
    """The loss of an example is half its squared distance, so its gradient is ``weight - example``."""

    def __init__(self, constant=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((DIM,), DISTANCE / DIM**0.5))
        self.constant = constant

    def training_step(self, batch, batch_idx):
        return self.constant * (self.weight - batch).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
