"""What llama.cpp computes on GGUF files that are written here, beside what this package computes.

Tiny models with random weights of every architecture and scaling of positions that is written, or a published one. For
each file: the ids of texts, log-probabilities of every next token of a text, and 24 tokens of greedy text. Needs
llama-cpp-python, which is built from its source within minutes:

    python tests/foreign/compare_llama_cpp.py
    python tests/foreign/compare_llama_cpp.py --folder smollm2
"""

import argparse
import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import torch
import transformers

from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import (
    Attention,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Rope,
    TransformerConfig,
    YaRNScaling,
    export_gguf,
    import_gguf,
    save_huggingface,
)
from lightning_lm.models.huggingface.folder import load_pretrained
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer

TEXTS = [
    "The capital of France is Paris, and that of Italy is Rome.",
    "def main(x):\n    return x + 12345\n",
    "Café déjà vu: 中文 🙂\t\n  x  ",
    "I'll say: they've won 3-0!",
]
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 7, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, **HEADS),
    "mistral": transformers.MistralConfig(**SIZES, **HEADS, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SIZES, **HEADS),
    "qwen3": transformers.Qwen3Config(**SIZES, **HEADS, head_dim=64),
    "gemma2": transformers.Gemma2Config(**SIZES, **HEADS, head_dim=64, query_pre_attn_scalar=64, sliding_window=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **HEADS, head_dim=64, query_pre_attn_scalar=64, sliding_window=16),
}
SCALINGS = {
    "linear positions": LinearScaling(factor=4.0),
    "positions of Llama 3.1": Llama3Scaling(factor=8.0, original_context_length=8192),
    "YaRN": YaRNScaling(factor=4.0, original_context_length=64),
}
EQUAL = "equal"
QUANTIZATIONS = ("f32", "f16", "q8_0", "q4_1")


class LlamaCpp:
    """A file opened by llama.cpp, its cache of keys and values in float32."""

    def __init__(self, path: Path) -> None:
        kind = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            logits_all=True,
            verbose=False,
            n_threads=1,
            type_k=kind,
            type_v=kind,
            flash_attn=False,
        )

    def ids(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=False))

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        width = self.model.n_vocab()
        pointer = llama_cpp.llama_get_logits(self.model.ctx)
        values = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (len(ids), width)).copy()
        return torch.from_numpy(values).log_softmax(-1)

    def greedy(self, ids: list[int], number: int) -> list[int]:
        taken: list[int] = []
        for _ in range(number):
            taken.append(int(self.logprobs([*ids, *taken])[-1].argmax()))
        return taken


def tiny_models(folder: Path) -> Iterator[tuple[str, Path]]:
    tokenizer = BPETokenizer.train([*TEXTS * 20], vocab_size=320, show_progress=False)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        config.vocab_size = tokenizer.vocab_size
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1) * 0.5)
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)
        yield name, folder / name


def scaled_models(folder: Path) -> Iterator[tuple[str, Path]]:
    tokenizer = BPETokenizer.train([*TEXTS * 20], vocab_size=320, show_progress=False)
    for name, scaling in SCALINGS.items():
        torch.manual_seed(0)
        layer = Layer(mixer=Attention(num_heads=2, head_dim=64, rope=Rope(base=500_000.0, scaling=scaling)))
        shape = {"vocab_size": tokenizer.vocab_size, "d_model": 64, "num_layers": 3, "context_length": 256}
        model = TransformerConfig(layers=layer, **shape).build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1) * 0.5)
        save_huggingface(model, folder / name, tokenizer)
        yield name, folder / name


@torch.no_grad()
def logprobs_of(folder: Path, ids: list[int]) -> torch.Tensor:
    out = load_pretrained(folder).eval()(torch.tensor([ids]))
    return (out.logits if hasattr(out, "logits") else out)[0].float().log_softmax(-1)


@torch.no_grad()
def compare(name: str, source: Path, folder: Path, quantization: str) -> str:
    """Return a line: mean error of log-probabilities to the model, largest to the file as read back, greedy text."""
    path = folder / f"{name}-{quantization}.gguf"
    export_gguf(source, path, quantization=quantization)
    import_gguf(path, folder / "back")
    theirs, tokenizer = LlamaCpp(path), load_tokenizer(source)
    unequal = [text for text in TEXTS if theirs.ids(text) != tokenizer.encode(text)]
    ids = [index for text in TEXTS for index in tokenizer.encode(text)]
    given, back = logprobs_of(source, ids), logprobs_of(folder / "back", ids)
    got = theirs.logprobs(ids)[:, : given.shape[1]]
    generator = Generator(load_pretrained(folder / "back").eval(), tokenizer)
    (said,) = generator.generate([ids[:12]], sampling=Sampling(temperature=0), max_new_tokens=24)
    other = theirs.greedy(ids[:12], len(said.token_ids))
    part = next((k for k, pair in enumerate(zip(said.token_ids, other, strict=True)) if pair[0] != pair[1]), len(other))
    path.unlink()
    return (
        f"| {name} | {quantization} | {(got - given).abs().mean():.5f} | {(got - back).abs().mean():.5f} | "
        f"{(got - back).abs().max():.5f} | {(got.argmax(-1) == back.argmax(-1)).float().mean():.3f} | "
        f"{part} of {len(other)} | {unequal or EQUAL} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a published model, in place of the tiny ones")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"llama-cpp-python {llama_cpp.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        given = arguments.folder
        folder = Path(temporary)
        models = list(tiny_models(folder)) if given is None else [(given.name, given)]
        jobs = [(name, source, kind) for name, source in models for kind in QUANTIZATIONS]
        jobs += [] if given else [(name, source, "f32") for name, source in scaled_models(folder)]
        for name, source, kind in jobs:
            print(compare(name, source, folder, kind), flush=True)


if __name__ == "__main__":
    main()
