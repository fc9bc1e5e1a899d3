"""The rows of the running batch: each with its own sampling settings, random numbers, text and stop conditions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.sampling import draw
from lightning_lm.generation.decoding_loop import Row
from lightning_lm.generation.detokenizer import AnswerText
from lightning_lm.generation.sampling import Sampler, Sampling, beside, likeliest, row_uniforms
from lightning_lm.protocols import Tokenizer
from lightning_lm.serving.request import GenerationRequest, TokenLogprob, Update, failing

__all__ = ["Running", "choose", "token_logprobs"]

_AT_ONCE = 256
"""Tokens of a prompt whose log-probabilities over the vocabulary are held at the same time."""


class Running:
    """A completion in the making.

    Args:
        request: The request.
        tokenizer: That of the model.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text = AnswerText(tokenizer, request.prompt_ids, request.stop_strings)
        self.row = Row(request.prompt_ids, (0, request.sample), self.text)
        self.num_read = 0
        """Tokens of the prompt that have been read."""
        self.prompt_logprobs: list[TokenLogprob | None] = [None] if request.prompt_logprobs else []
        sampling, most = request.sampling, request.ends.max_new_tokens
        self._sampler: Sampler | None = None
        self._uniforms: Tensor | None = None
        self.settings: Sampling | None = None
        """Settings that choose a token, which rows may share; ``None`` if the choice depends on earlier tokens."""
        if not sampling.remembers:
            fields = () if sampling.greedy else ("temperature", "top_k", "top_p", "min_p")
            self.settings = Sampling(**({"temperature": 0.0} | {name: getattr(sampling, name) for name in fields}))
        if sampling.remembers:
            keys = [self.row.key]
            self._sampler = Sampler(sampling, [request.prompt_ids], keys=keys, max_new_tokens=most)
        elif not sampling.greedy:
            self._uniforms = row_uniforms(sampling.seed, [self.row.key], most)[0]

    @property
    def newest(self) -> int:
        """The token that the model reads next."""
        return self.row.token_ids[-1]

    @property
    def is_done(self) -> bool:
        """True if nothing more is to be generated."""
        return self.row.finish_reason is not None or self.request.is_cancelled or self.request.is_done

    @property
    def uniform(self) -> float:
        """Random number of the next token."""
        assert self._uniforms is not None
        return float(self._uniforms[len(self.row.token_ids)])

    def choose_alone(self, logits: Tensor) -> int:
        """Return the next token under penalties.

        Args:
            logits: Float [1, vocab].
        """
        assert self._sampler is not None
        return int(self._sampler.choose(logits))

    def biased(self, logits: Tensor) -> Tensor:
        """Return logits [vocab] with the request's bias added."""
        bias = self.request.logit_bias
        if not bias:
            return logits
        places = torch.tensor(list(bias), device=logits.device)
        values = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, places, values)

    def take(self, token: int, vocab: int, logprobs: TokenLogprob | None) -> None:
        """Append a token and deliver the progress.

        Args:
            token: The token; ``vocab`` if the logits were not valid.
            vocab: Number of ids.
            logprobs: Its log-probability, if it was asked for.
        """
        if token >= vocab:
            self.request.fail(
                ConfigurationError(
                    "The model gave logits that are all NaN or -inf, from which no token can be chosen. Look for NaN "
                    "in its weights, or for numbers beyond the range of its data type."
                )
            )
            return
        self.row.take([token], self.request.ends, None)
        self._deliver((token,), () if logprobs is None else (logprobs,))

    def finish_unanswered(self) -> None:
        """End a request that asks for no new token."""
        self.row.finish_reason = "length"
        self._deliver((), ())

    def _deliver(self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> None:
        reason = self.row.finish_reason
        if reason is not None:
            self.text.finish()
            self.request.is_done = True
        prompt, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        self.request.deliver(Update(self.text.take(), ids, logprobs, prompt, reason))


def choose(rows: Sequence[Running], logits: Tensor, num_ids: int) -> None:
    """Choose the next token of each row, and hand it over.

    Rows with equal settings are computed together; each has its own random number.

    Args:
        rows: Rows of the batch.
        logits: Float [rows, vocab].
        num_ids: Ids below this number can be chosen.
    """
    usable = logits[:, :num_ids].float()
    if any(row.request.logit_bias for row in rows):
        usable = torch.stack([row.biased(values) for row, values in zip(rows, usable, strict=True)])
    ids = [0] * len(rows)
    groups: dict[Sampling | int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(place if row.settings is None else row.settings, []).append(place)
    for settings, places in groups.items():
        chosen = usable if len(places) == len(rows) else usable[places]
        with failing(rows[place].request for place in places):
            for place, token in zip(places, _choose_alike([rows[p] for p in places], chosen, settings), strict=True):
                ids[place] = token
    scores = _scores(rows, logits, ids, num_ids)
    for place, row in enumerate(rows):
        if not row.is_done:
            with failing([row.request]):
                row.take(ids[place], usable.shape[1], scores.get(place))


def _choose_alike(rows: Sequence[Running], logits: Tensor, settings: Sampling | int) -> list[int]:
    if isinstance(settings, int):
        return [rows[0].choose_alone(logits)]
    if settings.greedy:
        greedy: list[int] = likeliest(logits).tolist()
        return greedy
    uniforms = torch.tensor([row.uniform for row in rows], dtype=torch.float64)
    drawn: list[int] = draw(settings.truncate(logits), beside(logits, uniforms)).tolist()
    return drawn


def _scores(rows: Sequence[Running], logits: Tensor, ids: Sequence[int], num_ids: int) -> Mapping[int, TokenLogprob]:
    """Return the log-probabilities of the rows that ask for them, by their places."""
    asking = [p for p, row in enumerate(rows) if row.request.top_logprobs is not None and ids[p] < logits.shape[1]]
    if not asking:
        return {}
    most = max(rows[p].request.top_logprobs or 0 for p in asking)
    scores = token_logprobs(logits[asking], [ids[p] for p in asking], most, num_ids)
    return {
        p: TokenLogprob(score.token_id, score.logprob, score.top[: rows[p].request.top_logprobs])
        for p, score in zip(asking, scores, strict=True)
    }


def token_logprobs(logits: Tensor, ids: Sequence[int], top: int, num_ids: int) -> list[TokenLogprob]:
    """Return the log-probabilities of tokens.

    Args:
        logits: Float [tokens, vocab].
        ids: The tokens.
        top: Number of likeliest tokens to report beside each.
        num_ids: Ids below this number are tokens; a model may have more, which no text has.
    """
    scored = []
    for part, chosen in zip(logits.split(_AT_ONCE), torch.tensor(ids).split(_AT_ONCE), strict=True):
        logprobs = part.float().log_softmax(dim=-1)
        values = logprobs.gather(1, chosen.to(part.device)[:, None])[:, 0].tolist()
        best, places = logprobs[:, :num_ids].topk(min(top, num_ids, part.shape[1]), dim=-1)
        rows = zip(chosen.tolist(), values, places.tolist(), best.tolist(), strict=True)
        scored += [TokenLogprob(token, value, tuple(zip(p, b, strict=True))) for token, value, p, b in rows]
    return scored
