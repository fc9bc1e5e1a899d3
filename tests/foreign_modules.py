"""Ten LightningModules that know nothing of this package, and the batches that they train on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["MODULES", "Foreign", "loader_of"]

VOCAB, WIDTH, ROWS, LENGTH = 40, 16, 4, 9


class Supervised(LightningModule):
    """Trains by one optimizer; subclasses have a forward and a loss."""

    def forward_loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.forward_loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.forward_loss(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Images(Supervised):
    """A perceptron for images and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def forward_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Convolutions(Images):
    """A convolutional network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )


class GAN(LightningModule):
    """Two optimizers, stepped by hand; ``training_step`` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 64), nn.Linear(64, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0].flatten(1)
        for_generator, for_discriminator = self.optimizers()
        fake = self(torch.ones(len(images), 4))
        loss = F.softplus(-self.discriminator(fake)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        loss = F.softplus(-self.discriminator(images)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.log("d_loss", loss, prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.softplus(-self.discriminator(batch[0].flatten(1))).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.discriminator)]


class Tokens(Supervised):
    """A model of token ids: an embedding, a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(VOCAB, WIDTH), self.make_body(), nn.Linear(WIDTH, VOCAB)

    def make_body(self) -> nn.Module:
        raise NotImplementedError

    def mixed(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mixed(self.embed(ids)))

    def forward_loss(self, batch: Any) -> Tensor:
        logits = self(batch["input_ids"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


class Recurrent(Tokens):
    """An LSTM."""

    def make_body(self) -> nn.Module:
        return nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def mixed(self, x: Tensor) -> Tensor:
        return self.body(x)[0]


class Encoder(Tokens):
    """`nn.TransformerEncoder` with a causal mask."""

    def make_body(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def mixed(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        return self.body(x, mask=mask, is_causal=True)


class Heads(Tokens):
    """`nn.MultiheadAttention`."""

    def make_body(self) -> nn.Module:
        return nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def mixed(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)
        return x + self.body(x, x, x, attn_mask=mask, need_weights=False)[0]


class OfTransformers(Supervised):
    """A causal language model of ``transformers``, whose forward takes keywords and returns an object."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.lm = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=16))

    def forward(self, **batch: Tensor) -> Any:
        return self.lm(**batch)

    def forward_loss(self, batch: Any) -> Tensor:
        return self(**batch).loss


class Pairs(Tokens):
    """nanoGPT's form: ``(x, y)``, and a forward that returns logits and loss."""

    def make_body(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def forward_loss(self, batch: Any) -> Tensor:
        return self(*batch)[1]


class Dictionaries(Images):
    """Batches are dictionaries of other names; the step returns one too."""

    def forward(self, pixels: Tensor, labels: Tensor) -> Any:
        logits = self.net(pixels)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}

    def forward_loss(self, batch: Any) -> Tensor:
        return self(**batch)["loss"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": torch.ones(3)}


class ByHand(Recurrent):
    """Manual optimization that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = self.forward_loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def _images(generator: torch.Generator) -> Any:
    return [torch.rand(ROWS, 1, 8, 8, generator=generator), torch.randint(10, (ROWS,), generator=generator)]


def _tokens(generator: torch.Generator) -> Any:
    return {"input_ids": torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)}


def _labelled(generator: torch.Generator) -> Any:
    ids = _tokens(generator)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone()}


def _pairs(generator: torch.Generator) -> Any:
    ids = _tokens(generator)["input_ids"]
    return (ids[:, :-1], ids[:, 1:])


def _named(generator: torch.Generator) -> Any:
    return dict(zip(("pixels", "labels"), _images(generator), strict=True))


class Foreign(NamedTuple):
    """A module, its batches, and how many of a batch's positions predict a token."""

    make: Callable[[], LightningModule]
    batch: Callable[[torch.Generator], Any]
    tokens: int


_OF_A_BATCH = ROWS * (LENGTH - 1)

MODULES = {
    "perceptron": Foreign(Images, _images, 0),
    "convolutions": Foreign(Convolutions, _images, 0),
    "GAN": Foreign(GAN, _images, 0),
    "LSTM": Foreign(Recurrent, _tokens, _OF_A_BATCH),
    "TransformerEncoder": Foreign(Encoder, _tokens, _OF_A_BATCH),
    "MultiheadAttention": Foreign(Heads, _tokens, _OF_A_BATCH),
    "transformers": Foreign(OfTransformers, _labelled, _OF_A_BATCH),
    "pairs": Foreign(Pairs, _pairs, _OF_A_BATCH),
    "dictionaries": Foreign(Dictionaries, _named, 0),
    "by hand": Foreign(ByHand, _tokens, _OF_A_BATCH),
}
"""By name."""


def loader_of(foreign: Foreign, batches: int, *, seed: int = 0) -> DataLoader:
    """Return as many batches, the same each time."""

    def made() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batches):
            yield foreign.batch(generator)

    return DataLoader(list(made()), batch_size=None)
