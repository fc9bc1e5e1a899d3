"""Transformers as parts: what a layer is made of is chosen, not switched on."""

from lightning_lm.models.attention import Attention, Mixer
from lightning_lm.models.cache import KVCache
from lightning_lm.models.config import Layer, ModelConfig, TransformerConfig
from lightning_lm.models.ffn import FFN, GLU, MLP
from lightning_lm.models.init import DepthScaled, FanIn, Init, Normal, TruncatedNormal
from lightning_lm.models.norms import LayerNorm, NoNorm, Norm, RMSNorm
from lightning_lm.models.positions import (
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Positions,
    Rope,
    RopeScaling,
    SinusoidalPositions,
    YaRNScaling,
)
from lightning_lm.models.roles import Role, parameter_roles
from lightning_lm.models.transformer import Transformer

__all__ = [
    "FFN",
    "GLU",
    "MLP",
    "Attention",
    "DepthScaled",
    "FanIn",
    "Init",
    "KVCache",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "Mixer",
    "ModelConfig",
    "NTKScaling",
    "NoNorm",
    "Norm",
    "Normal",
    "Positions",
    "RMSNorm",
    "Role",
    "Rope",
    "RopeScaling",
    "SinusoidalPositions",
    "Transformer",
    "TransformerConfig",
    "TruncatedNormal",
    "YaRNScaling",
    "parameter_roles",
]
