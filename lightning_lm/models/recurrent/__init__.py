"""Mixers that carry a state from token to token: linear attention, delta rules, state spaces, Hyena, LSTM and GRU."""

from lightning_lm.models.recurrent.cells import Recurrent
from lightning_lm.models.recurrent.delta_net import DeltaNet, GatedDeltaNet
from lightning_lm.models.recurrent.hyena import Hyena
from lightning_lm.models.recurrent.linear_attention import Decay, FixedDecay, GatedDecay, LinearAttention
from lightning_lm.models.recurrent.mixer import RecurrentMixer, RecurrentPart, RecurrentState
from lightning_lm.models.recurrent.parallel import Parallel
from lightning_lm.models.recurrent.ssd import SSD
from lightning_lm.models.recurrent.window_mlp import WindowMLP

__all__ = [
    "SSD",
    "Decay",
    "DeltaNet",
    "FixedDecay",
    "GatedDecay",
    "GatedDeltaNet",
    "Hyena",
    "LinearAttention",
    "Parallel",
    "Recurrent",
    "RecurrentMixer",
    "RecurrentPart",
    "RecurrentState",
    "WindowMLP",
]
