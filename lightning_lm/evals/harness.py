"""Adapter for lm-evaluation-harness: its tasks, on the models of this package.

The harness finds models in a registry of its own and loads no plug-ins, so the adapter registers itself when this
module is imported; ``lightning-lm evaluate harness ...`` does that and then runs the harness's own command line.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.evals.local_model import LocalModel
from lightning_lm.evals.requests import EvaluatedModel, Generation, Likelihood, Prompt, RollingLikelihood
from lightning_lm.evals.server_model import ServerModel
from lightning_lm.generation import Sampling
from lightning_lm.tokenizers import load_tokenizer

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingDependencyError("lm_eval", "run lm-evaluation-harness", extra="evals") from error

__all__ = ["HarnessModel", "run_harness"]

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MAX_NEW_TOKENS = 256
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("lightning_lm")
class HarnessModel(LM):  # type: ignore[misc]
    """A checkpoint, a model in this process, or a server, as a model of lm-evaluation-harness.

    Args:
        model: The model as evaluations ask it, such as a `LocalModel`; or one of the following.
        checkpoint: A ``.ckpt`` file, or a Hugging Face folder.
        server: Address of a server with OpenAI's interface, such as ``http://localhost:8000/v1``.
        model_name: Name of the model on the server.
        tokenizer: Folder or file of the tokenizer; by default the checkpoint's.
        batch_size: Most rows of a forward pass; ``auto`` takes 32.
        device: Device of the checkpoint's model; by default ``cpu``.
        max_length: Tokens of the context; by default the model's.
        **_: Further settings that the harness passes to every model.

    Raises:
        ConfigurationError: If not exactly one model is named.
    """

    load_model: ClassVar[Callable[..., tuple[Any, Any]] | None] = None
    """Reads a checkpoint; given from outside, as it lies in a layer above."""

    def __init__(
        self,
        model: EvaluatedModel | None = None,
        *,
        checkpoint: str | None = None,
        server: str | None = None,
        model_name: str = "default",
        tokenizer: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if sum(part is not None for part in (model, checkpoint, server)) != 1:
            raise ConfigurationError("Name one model: checkpoint=PATH or server=URL in --model_args.")
        self._tokenizer = None if tokenizer is None else load_tokenizer(Path(tokenizer))
        if server is not None:
            model = ServerModel(server, model_name, tokenizer=self._tokenizer, max_length=max_length)
        elif checkpoint is not None:
            rows = int(str(batch_size)) if str(batch_size).isdigit() else 32
            model = self._local(Path(checkpoint), device, batch_size=rows, max_length=max_length)
        assert model is not None
        self.model = model

    def _local(self, checkpoint: Path, device: str | None, **settings: Any) -> LocalModel:
        if HarnessModel.load_model is None:
            raise ConfigurationError("Checkpoints are read by `lightning-lm evaluate harness`; use that command.")
        loaded, own = HarnessModel.load_model(checkpoint)
        tokenizer = self._tokenizer or own
        if tokenizer is None:
            raise ConfigurationError(f"{checkpoint} has no tokenizer; add tokenizer=PATH to --model_args.")
        if device is None or not torch.accelerator.is_available():  # the harness asks for CUDA unless told otherwise
            device = "cpu"
        return LocalModel(loaded.to(device), tokenizer, **settings)

    @property
    def tokenizer_name(self) -> str:
        """Digest of the tokenizer, by which the harness keeps requests apart."""
        tokenizer = getattr(self.model, "tokenizer", None)
        return "" if tokenizer is None else str(tokenizer.fingerprint)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template.

        Args:
            chat_template: ``False`` for none.
        """
        template = getattr(getattr(self.model, "tokenizer", None), "chat_template", None)
        return template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return turns as text, which from then on is read with its special tokens.

        Args:
            chat_history: Turns with role and content.
            add_generation_prompt: Let the text end where the model's turn begins.

        Raises:
            ConfigurationError: If the tokenizer has no template, or the model is behind a server.
        """
        if not isinstance(self.model, LocalModel):
            raise ConfigurationError("Chat templates need the model's tokenizer; evaluate a checkpoint.")
        self.model.encoder.templated = True
        tokenizer: Any = self.model.tokenizer
        return str(tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log-likelihood and whether it is the greedy completion, of each continuation.

        Args:
            requests: Instances with context and continuation.
        """
        asked = [Likelihood(Prompt(context), continuation) for context, continuation in _arguments(requests)]
        return [(answer.logprob, answer.is_greedy) for answer in self.model.log_likelihoods(asked)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-likelihood of each text.

        Args:
            requests: Instances with a text.
        """
        return [
            answer.logprob
            for answer in self.model.log_likelihoods([RollingLikelihood(text) for (text,) in _arguments(requests)])
        ]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return a completion of each context.

        Args:
            requests: Instances with context and settings.
        """
        asked = [_generation(context, settings) for context, settings in _arguments(requests)]
        return [answer.texts[0] for answer in self.model.generate(asked)]


def run_harness(words: Sequence[str], load_model: Callable[..., tuple[Any, Any]] | None = None) -> None:
    """Run the harness's command line with our model.

    Args:
        words: Its options, such as ``--model_args checkpoint=x.ckpt --tasks hellaswag``.
        load_model: Returns model and tokenizer of a file or folder.
    """
    from lm_eval.__main__ import cli_evaluate

    HarnessModel.load_model = None if load_model is None else staticmethod(load_model)
    given, model = sys.argv, [] if "--model" in words else ["--model", "lightning_lm"]
    sys.argv = ["lm_eval", "run", *model, *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = given


def _arguments(requests: list[Any]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _generation(context: str, settings: dict[str, Any]) -> Generation:
    until = settings.get("until") or []
    samples = settings.get("do_sample", bool(settings.get("temperature")))
    sampling = Sampling(temperature=0)
    if samples:
        given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        sampling = Sampling(temperature=float(settings.get("temperature") or 1.0), seed=0, **given)
    return Generation(
        Prompt(context),
        stop=tuple([until] if isinstance(until, str) else filter(None, until)),
        max_new_tokens=next((int(settings[name]) for name in _LENGTHS if settings.get(name)), _MAX_NEW_TOKENS),
        sampling=sampling,
    )
