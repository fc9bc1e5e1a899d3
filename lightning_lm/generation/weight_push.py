"""The weights of a policy for an inference server: a folder that it can read, and the word to read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.json_http import JSONServer
from lightning_lm.models import export_model
from lightning_lm.parts import Part
from lightning_lm.protocols import Tokenizer

__all__ = ["WeightPush"]


@dataclass(frozen=True, kw_only=True)
class WeightPush(Part):
    """Saves the policy in the format of Hugging Face and asks an inference server to load it.

    The defaults are those of SGLang. vLLM reads the folder that it was started with again: start it with ``vllm serve
    FOLDER`` and ``VLLM_SERVER_DEV_MODE=1``, and give ``path: collective_rpc`` and ``body: {method: reload_weights}``.
    The server must discard what it has cached under the old weights: SGLang does, vLLM needs
    ``--no-enable-prefix-caching``.

    Args:
        server: Address to which ``path`` is relative, often above the API: ``{url: http://localhost:30000}``.
        folder: Folder of the saved weights; server and rank 0 see it under this name. It is rewritten each time.
        path: Path of the request, below the address.
        body: Body of the request; ``{folder}`` in a text stands for the folder.
        every: Least optimizer steps from one time to the next; more than a rollout lasts makes the completions older.
    """

    server: JSONServer
    folder: str
    path: str = "update_weights_from_disk"
    body: Mapping[str, Any] = field(default_factory=lambda: {"model_path": "{folder}"})
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"every={self.every} must be at least 1 optimizer step.")

    def __call__(self, model: nn.Module, tokenizer: Tokenizer | None) -> None:
        """Save the weights and have the server load them; returns once it confirms.

        Args:
            model: The policy, whole.
            tokenizer: That of the policy.

        Raises:
            RemoteError: If the server cannot be reached, or does not load them.
        """
        export_model(model, self.folder, tokenizer)
        body = {
            name: value.replace("{folder}", self.folder) if isinstance(value, str) else value
            for name, value in self.body.items()
        }
        answer = self.server.post(self.path, body)
        if answer.get("success") is False:
            raise RemoteError(
                f"The server did not load the weights in {self.folder}: {str(answer.get('message', answer))[:300]}. It "
                "must see that folder under the same name, and hold a model of the same shapes."
            )
