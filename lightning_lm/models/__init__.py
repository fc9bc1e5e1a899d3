"""Transformers as parts: what a layer is made of is chosen, not switched on."""

from lightning_lm.models.attention import Attention
from lightning_lm.models.auxiliary import LayerLoad, collect_auxiliary
from lightning_lm.models.cache import KVCache, LayerState
from lightning_lm.models.clamped_glu import ClampedGLU
from lightning_lm.models.config import ModelConfig
from lightning_lm.models.context import Context, make_context
from lightning_lm.models.cross_attention import CrossAttention
from lightning_lm.models.encoder import Encoder, EncoderConfig, PredictionHead
from lightning_lm.models.encoder_decoder import ConditionedDecoder, EncoderDecoder, EncoderDecoderConfig, decoder_layers
from lightning_lm.models.experts import (
    Balance,
    Groups,
    HashRouter,
    LaggedLoss,
    LoadBias,
    MixtureOfExperts,
    MoE,
    Router,
    SequenceLoss,
    TopK,
)
from lightning_lm.models.ffn import FFN, GLU, MLP
from lightning_lm.models.gated_attention import GatedAttention
from lightning_lm.models.gguf import export_gguf, import_gguf
from lightning_lm.models.grow import grow_vocabulary
from lightning_lm.models.huggingface.config_json import config_from_huggingface, config_to_huggingface
from lightning_lm.models.huggingface.folder import (
    PretrainedCheckpoint,
    export_model,
    load_huggingface,
    save_huggingface,
)
from lightning_lm.models.huggingface.generation_config import (
    add_end_ids,
    end_ids,
    generation_settings,
    prompt_is_prefix,
    set_generation_settings,
    set_prompt_is_prefix,
)
from lightning_lm.models.huggingface.peft_adapters import PretrainedAdapters, save_adapters
from lightning_lm.models.huggingface.transformers_model import TransformersConfig, TransformersModel, as_language_model
from lightning_lm.models.init import DepthScaled, FanIn, Init, Normal, TruncatedNormal
from lightning_lm.models.latent_attention import LatentAttention
from lightning_lm.models.lora import (
    AdapterPart,
    Adapters,
    attach_adapters,
    describe_adapters,
    merge_adapters,
    remove_adapters,
)
from lightning_lm.models.mixer import Mixer, MixerModule
from lightning_lm.models.multi_token import (
    AheadHeads,
    MultiTokenConfig,
    MultiTokenTransformer,
    ParallelHeads,
    SequentialHeads,
)
from lightning_lm.models.mup import MuP, MuPAttention
from lightning_lm.models.ngram import NgramModel, fit_ngram, load_ngram, read_arpa, save_ngram, write_arpa
from lightning_lm.models.ngram_classifier import NgramClassifier
from lightning_lm.models.norms import LayerNorm, NoNorm, Norm, RMSNorm
from lightning_lm.models.position_bias import ALiBi, RelativeBias
from lightning_lm.models.positions import (
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Positions,
    Rope,
    RopeScaling,
    RotaryTable,
    SinusoidalPositions,
    YaRNScaling,
)
from lightning_lm.models.presets import gpt2, llama2, llama3, mistral, qwen2, qwen3, tinystories
from lightning_lm.models.recurrent import (
    SSD,
    Decay,
    DeltaNet,
    FixedDecay,
    GatedDecay,
    GatedDeltaNet,
    Hyena,
    LinearAttention,
    Parallel,
    Recurrent,
    RecurrentMixer,
    RecurrentPart,
    RecurrentState,
    WindowMLP,
)
from lightning_lm.models.roles import Role, parameter_roles
from lightning_lm.models.sink_attention import SinkAttention
from lightning_lm.models.summary import (
    ModelDescription,
    active_parameters,
    describe,
    flops_per_token,
    memory_estimate,
    parameter_table,
    render,
)
from lightning_lm.models.transformer import Layer, Transformer, TransformerConfig
from lightning_lm.models.word2vec import SkipGram, WordVectors

__all__ = [
    "FFN",
    "GLU",
    "MLP",
    "SSD",
    "ALiBi",
    "AdapterPart",
    "Adapters",
    "AheadHeads",
    "Attention",
    "Balance",
    "ClampedGLU",
    "ConditionedDecoder",
    "Context",
    "CrossAttention",
    "Decay",
    "DeltaNet",
    "DepthScaled",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FanIn",
    "FixedDecay",
    "GatedAttention",
    "GatedDecay",
    "GatedDeltaNet",
    "Groups",
    "HashRouter",
    "Hyena",
    "Init",
    "KVCache",
    "LaggedLoss",
    "LatentAttention",
    "Layer",
    "LayerLoad",
    "LayerNorm",
    "LayerState",
    "LearnedPositions",
    "LinearAttention",
    "LinearScaling",
    "Llama3Scaling",
    "LoadBias",
    "Mixer",
    "MixerModule",
    "MixtureOfExperts",
    "MoE",
    "ModelConfig",
    "ModelDescription",
    "MuP",
    "MuPAttention",
    "MultiTokenConfig",
    "MultiTokenTransformer",
    "NTKScaling",
    "NgramClassifier",
    "NgramModel",
    "NoNorm",
    "Norm",
    "Normal",
    "Parallel",
    "ParallelHeads",
    "Positions",
    "PredictionHead",
    "PretrainedAdapters",
    "PretrainedCheckpoint",
    "RMSNorm",
    "Recurrent",
    "RecurrentMixer",
    "RecurrentPart",
    "RecurrentState",
    "RelativeBias",
    "Role",
    "Rope",
    "RopeScaling",
    "RotaryTable",
    "Router",
    "SequenceLoss",
    "SequentialHeads",
    "SinkAttention",
    "SinusoidalPositions",
    "SkipGram",
    "TopK",
    "Transformer",
    "TransformerConfig",
    "TransformersConfig",
    "TransformersModel",
    "TruncatedNormal",
    "WindowMLP",
    "WordVectors",
    "YaRNScaling",
    "active_parameters",
    "add_end_ids",
    "as_language_model",
    "attach_adapters",
    "collect_auxiliary",
    "config_from_huggingface",
    "config_to_huggingface",
    "decoder_layers",
    "describe",
    "describe_adapters",
    "end_ids",
    "export_gguf",
    "export_model",
    "fit_ngram",
    "flops_per_token",
    "generation_settings",
    "gpt2",
    "grow_vocabulary",
    "import_gguf",
    "llama2",
    "llama3",
    "load_huggingface",
    "load_ngram",
    "make_context",
    "memory_estimate",
    "merge_adapters",
    "mistral",
    "parameter_roles",
    "parameter_table",
    "prompt_is_prefix",
    "qwen2",
    "qwen3",
    "read_arpa",
    "remove_adapters",
    "render",
    "save_adapters",
    "save_huggingface",
    "save_ngram",
    "set_generation_settings",
    "set_prompt_is_prefix",
    "tinystories",
    "write_arpa",
]
