"""A server in this process over a tiny model, as clients meet it."""

import contextlib
import itertools
import socket
import threading
from unittest import mock

import torch
import uvicorn

from lightning_lm.models import GLU, Attention, Layer, Rope, TransformerConfig
from lightning_lm.serving import Engine
from lightning_lm.serving.server import Server
from lightning_lm.tokenizers import ByteTokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(*, template=TEMPLATE):
    tokenizer = ByteTokenizer(SPECIAL, eos_token="<|endoftext|>")
    return tokenizer.with_chat_template(template) if template else tokenizer


def tiny_model(seed=0, *, context_length=512):
    """Return a model of bytes that never ends a text by itself."""
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=260, d_model=32, num_layers=2, context_length=context_length,
        layers=Layer(mixer=Attention(num_heads=4, num_kv_heads=2, rope=Rope()), ffn=GLU()), tie_embeddings=False,
    )  # fmt: skip
    model = config.build().eval()
    with torch.no_grad():
        for weight in model.parameters():  # large enough that greedy completions do not repeat one token
            torch.nn.init.normal_(weight, std=0.3)
        model.head.weight[128:] = 0  # letters are likelier than parts of characters and special tokens
        model.head.weight[:32] = 0
    return model


@contextlib.contextmanager
def serving(model, tokenizer, *, engine=None, **settings):
    """Yield the address of a server, such as ``http://127.0.0.1:1234``, and its engine.

    A request without a seed gets a number that counts up: no test meets an end of text that another run does not.
    """
    seeds = itertools.count()
    with (
        mock.patch("secrets.randbits", side_effect=seeds),
        Engine(model, tokenizer, **(engine or {})).running() as running,
        socket.create_server(("127.0.0.1", 0)) as at,
    ):
        app = Server(running, "tiny", **settings).app
        # Without a configuration of its own, which closes all log handlers: absl's closes the stream it was made with.
        quiet = {"log_config": None, "log_level": "warning"}
        config = uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=1, **quiet)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{at.getsockname()[1]}", running
        finally:
            server.should_exit = True
            thread.join()
