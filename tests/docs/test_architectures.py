"""The tables of the page of architectures say what the code does: each yes and no is tried on a small model."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_lm.data as data
import lightning_lm.models as models
from lightning_lm.errors import ConfigurationError
from lightning_lm.models.huggingface.families import FAMILIES
from lightning_lm.strategies.context_parallel import _mixers
from lightning_lm.strategies.tensor_parallel.plan import check_covered, read_plan

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
IDS = torch.arange(3, 25).reshape(2, 11)


def table(heading: str) -> list[SimpleNamespace]:
    """Return the rows of the first table under a heading: code of the first column, all cells by their titles."""
    lines = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    titles, _, *rows = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if line.startswith("|")]
    cells = [dict(zip((t.strip() for t in titles), (cell.strip() for cell in row), strict=True)) for row in rows]
    return [SimpleNamespace(code=re.search(r"`([^`]+)`", next(iter(row.values())))[1], cells=row) for row in cells]


MIXERS, FFNS = table("Mixers"), table("Feed-forward parts")


def build(row: SimpleNamespace, field: str) -> torch.nn.Module:
    part = eval(row.code, vars(models) | {"models": models})
    layer = models.Layer(**{"mixer": models.Attention(num_heads=4), "ffn": models.MLP(), field: part})
    torch.manual_seed(0)
    config = models.TransformerConfig(vocab_size=40, d_model=64, num_layers=2, context_length=32, layers=layer)
    return config.build().double().eval()


def works(trial, *arguments) -> bool:
    try:
        trial(*arguments)
    except ConfigurationError:
        return False
    return True


def keeps_documents_apart(model) -> None:
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
    packed = model(IDS, document_ids=documents)
    for row, cut in ((0, 4), (1, 9)):
        alone = torch.cat([model(part) for part in (IDS[row : row + 1, :cut], IDS[row : row + 1, cut:])], 1)
        assert torch.allclose(packed[row], alone[0], atol=1e-9)


def reads_by_a_cache(model) -> None:
    cache = model.make_cache(2, 11)
    stepwise = [model(IDS[:, :5], cache=cache), *(model(IDS[:, t : t + 1], cache=cache) for t in range(5, 11))]
    assert torch.allclose(torch.cat(stepwise, 1), model(IDS), atol=1e-9)


def takes_tokens_back(model) -> None:
    """Rows go back by different counts, as in speculative decoding, and read other tokens instead."""
    cache = model.make_cache(2, 32)
    cache.keep_newest(2)
    model(IDS[:, :6], cache=cache)
    model(IDS[:, 6:9], cache=cache)
    cache.rewind(torch.tensor([1, 2]))
    after = model(IDS[:, 9:], cache=cache)
    for row, kept in ((0, 8), (1, 7)):
        alone = model(torch.cat((IDS[row : row + 1, :kept], IDS[row : row + 1, 9:]), 1))
        assert torch.allclose(after[row], alone[0, kept:], atol=1e-9)


def is_split_by_tensors(model) -> None:
    check_covered(model, read_plan(model), sequence_parallel=False)


TRIALS = {
    "packed": keeps_documents_apart,
    "cache": reads_by_a_cache,
    "speculation": takes_tokens_back,
    "TP": is_split_by_tensors,
    "CP": _mixers,
}


@pytest.mark.parametrize(
    ("row", "field"),
    [*((row, "mixer") for row in MIXERS), *((row, "ffn") for row in FFNS)],
    ids=lambda value: getattr(value, "code", ""),
)
@torch.no_grad()
def test_a_part_does_what_its_row_says(row, field):
    model = build(row, field)
    said = {title: row.cells[title].split()[0].strip(":;,") for title in TRIALS if title in row.cells}
    assert said == {title: "yes" if works(TRIALS[title], model) else "no" for title in said}


def test_every_mixer_and_feed_forward_part_has_a_row():
    shown = {name for row in [*MIXERS, *FFNS] for name in re.findall(r"[A-Z]\w+", row.code)}
    bases = {models.Mixer, models.FFN, models.RecurrentPart}
    parts = [value for value in map(vars(models).get, models.__all__) if inspect.isclass(value)]
    known = {part.__name__ for part in parts if issubclass(part, models.Mixer | models.FFN) and part not in bases}
    assert known - {"CrossAttention", "MuPAttention"} <= shown  # a row of the encoder-decoders; a part of muP


def test_families_and_objectives_are_all_there():
    assert {row.code for row in table("Families of transformers")} == set(FAMILIES)
    kinds = (data.Denoiser, data.MaskedLM)
    parts = [value for value in map(vars(data).get, data.__all__) if inspect.isclass(value)]
    known = {part.__name__ for part in parts if issubclass(part, kinds) and part is not data.Denoiser}
    assert {row.code for row in table("Objectives")} == known


@pytest.mark.parametrize("heading", ["Mixers", "Feed-forward parts", "Objectives", "Encoders and encoder-decoders"])
def test_papers_are_those_that_the_code_names(heading):
    for row in table(heading):
        names = re.findall(r"[A-Z]\w+", row.code)
        parts = [value for name in names if (value := getattr(models, name, getattr(data, name, None)))]
        sources = "".join(inspect.getsource(sys.modules[part.__module__]) for part in parts)
        cited = re.findall(r"\d{4}\.\d{5}", row.cells["paper"])
        assert [paper for paper in cited if f"arXiv:{paper}" not in sources] == [], row.code
