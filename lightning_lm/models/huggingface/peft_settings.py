"""Settings of ``adapter_config.json``: what is read, and what is refused."""

import math
import re
from collections.abc import Mapping
from typing import Any

from lightning_lm.errors import ConfigurationError

__all__ = ["require_plain", "scale_of"]

_READ = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "megatron_core",
    "runtime_config",
}
"""Settings that are read, or that change nothing once the adapters are made; any other one must be off."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def scale_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what multiplies the product of the factors of a module.

    Args:
        settings: Settings of the adapters.
        module: Name of the module.
        rank: Rank of its factors.
    """
    patterns = settings.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(next(matching, settings.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def require_plain(settings: Mapping[str, Any], source: str) -> None:
    """Refuse adapters that are more than ``B A`` on some matrices, by the name of what they are.

    Args:
        settings: Settings of the adapters.
        source: Whose they are, for the error.

    Raises:
        ConfigurationError: If they are.
    """
    more = [f"{name}={value!r}" for name, value in settings.items() if name not in _READ and value]
    if settings.get("peft_type", "LORA") != "LORA":
        more.insert(0, f"peft_type={settings['peft_type']!r}")
    if settings.get("bias", "none") != "none":
        more.append(f"bias={settings['bias']!r}")
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        more.append(f"init_lora_weights={settings['init_lora_weights']!r} (it changes the weights below)")
    if more:
        raise ConfigurationError(
            f"{source} has adapters with {', '.join(more)}; only LoRA without it is supported. Merge them with peft, "
            "and start from the result: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER)."
        )
