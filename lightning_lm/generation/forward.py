"""Next-token logits for rows that grow: through a key-value cache, or by running the model over the whole prefix."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import prompt_is_prefix
from lightning_lm.protocols import LanguageModel

__all__ = ["CachedForward", "Forward", "PrefixForward", "ReversibleForward", "forward_for", "head_logits", "pass_cost"]


class Forward(Protocol):
    """Rows of tokens, and the next-token logits of each."""

    def prefill(self) -> Tensor:
        """Read the prompts; return logits [rows, vocab]."""
        ...

    def step(self, ids: Tensor) -> Tensor:
        """Append one id per row, int64 [rows]; return logits [rows, vocab]."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, int64; an index may occur several times."""
        ...


class ReversibleForward(Forward, Protocol):
    """Rows that may also grow by several tokens at once, and go back."""

    def extend(self, ids: Tensor) -> Tensor:
        """Append ids, int64 [rows, new]; return logits [rows, new, vocab]."""
        ...

    def rewind(self, columns: Tensor) -> None:
        """Take the newest ids of each row back, int64 [rows] of them."""
        ...


_PASS_COSTS = {"cpu": 64, "default": 4096}
"""Tokens that could be read in the time that a forward pass takes however few there are."""


def pass_cost(device_type: str) -> int:
    """Return the tokens that could be read in the time that a forward pass takes however few there are.

    Args:
        device_type: Kind of the model's device, such as ``cpu``.
    """
    return _PASS_COSTS.get(device_type, _PASS_COSTS["default"])


class CachedForward:
    """Reads each token once. Prompts are aligned on the right, so that all rows append to the same column.

    Prompts of very different lengths are read in groups of similar ones: padding costs as much as text. What all
    prompts begin with, such as the examples of a few-shot task, is read once.

    Args:
        model: Has ``make_cache`` as `lightning_lm.models.Transformer` has it.
        prompts: Token ids of each row, at least one.
        max_new_tokens: Most tokens that will be generated after a prompt.
        steps_agree: See `lightning_lm.generation.Generator`; ranks may need different numbers of groups.
        most_rewound: Most tokens of a row that are taken back at a time.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        steps_agree: Callable[[bool], bool] | None = None,
        *,
        most_rewound: int = 0,
    ) -> None:
        self._model, self._prompts, self._steps_agree = model, prompts, steps_agree
        self._device, self._is_prefix = _device(model), prompt_is_prefix(model)
        self._width = max(map(len, prompts))
        # The last generated token is never read, so the cache is one shorter than the text.
        self._cache = self._empty_cache(prompts, max_new_tokens - 1)
        if most_rewound and hasattr(self._cache, "keep_newest"):
            self._cache.keep_newest(most_rewound)

    def prefill(self) -> Tensor:
        """Read the prompts; return logits [rows, vocab]."""
        if not getattr(self._cache, "can_join", False):
            return self._read(self._prompts, self._cache)
        cost = pass_cost(self._device.type)
        groups = _similar_lengths([len(prompt) for prompt in self._prompts], cost)
        prefix = self._read_prefix(cost)
        passes = len(groups) + (prefix is not None)
        if prefix is not None:
            self._pass_follows()
        logits = (
            self._read(self._prompts, self._cache, prefix) if len(groups) == 1 else self._read_groups(groups, prefix)
        )
        self._run_along(passes)
        return logits

    def _read_prefix(self, cost: int) -> Any:
        """Return a cache of one row with what all prompts begin with; ``None`` where reading it apart saves nothing."""
        length = _common_length(self._prompts)
        able = getattr(self._cache, "can_rewind", False) and hasattr(self._cache, "begin_with")
        if (len(self._prompts) - 1) * length <= cost or not able or self._is_prefix:
            return None  # where a prompt is read in both directions, its beginning depends on its end
        prefix = self._prompts[0][:length]
        cache = self._empty_cache([prefix], 0)
        self._read([prefix], cache)
        return cache

    def _read_groups(self, groups: list[list[int]], prefix: Any) -> Tensor:
        """Read each group into a cache of its own, and let the common one take these over."""
        logits, parts = [], []
        for index, rows in enumerate(groups):
            prompts = [self._prompts[row] for row in rows]
            part = self._empty_cache(prompts, 0)
            logits.append(self._read(prompts, part, prefix))
            parts.append((torch.tensor(rows, device=self._device), part))
            if index + 1 < len(groups):
                self._pass_follows()
        self._cache.join(parts, self._width)
        return torch.cat(logits)[torch.cat([rows for rows, _ in parts]).argsort()]

    def _pass_follows(self) -> None:
        if self._steps_agree is not None:
            self._steps_agree(True)

    def _run_along(self, passes: int) -> None:
        """Run passes over one token until all ranks have read their prompts, at most one for each and for a prefix."""
        if self._steps_agree is not None:
            while self._steps_agree(False) and passes <= len(self._prompts):
                self._read([[0]], self._empty_cache([[0]], 0))
                passes += 1

    def _empty_cache(self, prompts: Sequence[Sequence[int]], more: int) -> Any:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        width = max(map(len, prompts))
        starts = None if min(map(len, prompts)) == width else width - lengths
        return self._model.make_cache(len(prompts), width + more, starts=starts)

    def _read(self, prompts: Sequence[Sequence[int]], cache: Any, prefix: Any = None) -> Tensor:
        """Read prompts into an empty cache, behind a prefix that was read; return logits [rows, vocab]."""
        if prefix is not None:
            return self._read_behind(prefix, prompts, cache)
        model, width = self._model, max(map(len, prompts))
        # A row is padded with a token of its own: a mask hides padding, but NaN of another token would come through.
        rows = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(rows, dtype=torch.int64, device=self._device)
        inputs = {"cache": cache, **self._prefixes(prompts)}
        if not isinstance(model, LanguageModel):
            return _logits(model(ids, **inputs))[:, -1]
        # Only the last position goes through the head: all logits of a long prompt may not fit into memory.
        return head_logits(model, model.hidden(ids, **inputs)[:, -1])

    def _prefixes(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the input by which a model reads prompts in both directions, if it does."""
        lengths = [len(prompt) for prompt in prompts]
        return {"prefix_lengths": torch.tensor(lengths, device=self._device)} if self._is_prefix else {}

    def _read_behind(self, prefix: Any, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Read the rest of prompts, padded on the right so that it follows the prefix, and then align the rows."""
        model, width = self._model, max(map(len, prompts))
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=self._device)
        rows = [[*prompt[prefix.length :], *[prompt[-1]] * (width - len(prompt))] for prompt in prompts]
        ids = torch.tensor(rows, dtype=torch.int64, device=self._device)
        cache.begin_with(prefix)
        last = torch.arange(len(prompts), device=self._device), ids.size(1) - 1 - padding
        if isinstance(model, LanguageModel):
            logits = head_logits(model, model.hidden(ids, cache=cache)[last])
        else:
            logits = _logits(model(ids, cache=cache))[last]
        if min(map(len, prompts)) < width:
            cache.align_right(padding)
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Append one id per row, int64 [rows]; return logits [rows, vocab]."""
        return self.extend(ids[:, None])[:, 0]

    def extend(self, ids: Tensor) -> Tensor:
        """Append ids, int64 [rows, new]; return logits [rows, new, vocab]."""
        return _logits(self._model(ids, cache=self._cache))

    def rewind(self, columns: Tensor) -> None:
        """Take the newest ids of each row back, int64 [rows] of them."""
        if not hasattr(self._cache, "rewind"):
            raise ConfigurationError(
                f"The cache of {type(self._model).__name__} cannot go back, which speculation needs. Decode without."
            )
        self._cache.rewind(columns)

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, int64; an index may occur several times."""
        self._cache.select(rows)


class PrefixForward:
    """Runs the model over everything so far at each step: slow, but any causal model will do.

    Prompts are padded on the right; under a causal mask, padding after the end of a row does not affect it.

    Args:
        model: Maps int64 ids [rows, seq] to logits [rows, seq, vocab], or to an object that has them as ``logits``.
        prompts: Token ids of each row, at least one.
        max_new_tokens: Most tokens that will be generated after a prompt.
    """

    def __init__(self, model: Callable[..., Any], prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._model = model
        width = max(len(prompt) for prompt in prompts) + max_new_tokens
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], dtype=torch.int64)
        self._ids = ids.to(_device(model))
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._ids.device)
        self._prefixes = self._lengths.clone() if prompt_is_prefix(model) else None

    def prefill(self) -> Tensor:
        """Read the prompts; return logits [rows, vocab]."""
        return self._newest(1)[:, 0]

    def step(self, ids: Tensor) -> Tensor:
        """Append one id per row, int64 [rows]; return logits [rows, vocab]."""
        return self.extend(ids[:, None])[:, 0]

    def extend(self, ids: Tensor) -> Tensor:
        """Append ids, int64 [rows, new]; return logits [rows, new, vocab]."""
        new = ids.shape[1]
        columns = torch.arange(new, device=ids.device)
        self._ids.scatter_(1, self._lengths[:, None] + columns, ids)
        self._lengths += new
        return self._newest(new)

    def rewind(self, columns: Tensor) -> None:
        """Take the newest ids of each row back, int64 [rows] of them."""
        self._lengths -= columns

    def _newest(self, columns: int) -> Tensor:
        """Return the logits at the last places of each row, [rows, columns, vocab]."""
        prefixes = {} if self._prefixes is None else {"prefix_lengths": self._prefixes}
        logits = _logits(self._model(self._ids[:, : int(self._lengths.max())], **prefixes))
        places = self._lengths[:, None] + torch.arange(-columns, 0, device=logits.device)
        return logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[-1]))

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, int64; an index may occur several times."""
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]
        self._prefixes = None if self._prefixes is None else self._prefixes[rows]


def forward_for(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    steps_agree: Callable[[bool], bool] | None = None,
    *,
    most_rewound: int = 0,
) -> ReversibleForward:
    """Return the fastest way to run this model over growing rows."""
    if hasattr(model, "make_cache"):
        return CachedForward(model, prompts, max_new_tokens, steps_agree, most_rewound=most_rewound)
    return PrefixForward(model, prompts, max_new_tokens)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [*, vocab] of hidden states [*, d_model].

    Args:
        model: Meets `lightning_lm.protocols.LanguageModel`.
        hidden: From ``model.hidden``.
    """
    logits: Tensor = model.head(hidden)
    softcap = getattr(model, "logit_softcap", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _similar_lengths(lengths: Sequence[int], padding: int) -> list[list[int]]:
    """Return groups of rows, the longest first, each with no more padding than was given."""
    groups: list[list[int]] = []
    used = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        used += lengths[groups[-1][0]] - lengths[row] if groups else 0
        if not groups or used > padding:
            groups.append([])
            used = 0
        groups[-1].append(row)
    return groups


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of ids that all prompts begin with alike; the last id of each is left to be read."""
    first, last = min(prompts, key=list), max(prompts, key=list)  # in lexicographic order: what these share, all do
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def _device(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise ConfigurationError(
            f"The model returned {type(output).__name__}; generation needs logits [rows, seq, vocab], or an object "
            "that has them as .logits."
        )
    return logits
