"""lm-evaluation-harness on an exported model: through our adapter, and through its own `hf` model."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lightning_lm.evals import LocalModel
from lightning_lm.evals.harness import HarnessModel
from lightning_lm.models import Attention, Layer, TransformerConfig, export_model, load_huggingface
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer

CONTEXT = 48
MARK = "<|endoftext|>"  # ours puts it before a text, as in training; the tokenizer of transformers does not
TEXT = "the cat sat on a mat while seven dogs ran past two red houses and the other cat slept, as cats do. "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    layer = Layer(mixer=Attention(num_heads=2))
    model = TransformerConfig(vocab_size=300, d_model=32, num_layers=2, layers=layer, context_length=CONTEXT).build()
    with torch.no_grad():
        model.head.weight.mul_(8)  # no near-ties between greedy tokens
    export_model(model, folder, BPETokenizer.train([TEXT * 3], vocab_size=300))
    ours = LocalModel(load_huggingface(folder), load_tokenizer(folder), batch_size=3, max_length=CONTEXT)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, max_length=CONTEXT)
    return HarnessModel(ours), theirs


def asked(kind, arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def test_log_likelihoods_are_those_of_hf(models):
    pairs = [
        ("the cat", " sat on a mat"),
        ("the cat ", "sat"),  # white space at the end belongs to the continuation
        ("the cat", " sat"),
        (TEXT * 3, "the cat"),  # longer than the context
        ("", "dogs ran past"),
        ("é — ", "naïve"),
    ]
    ours, theirs = models
    marked = [(MARK + context if context else "", continuation) for context, continuation in pairs]
    got = ours.loglikelihood(asked("loglikelihood", pairs))
    expected = theirs.loglikelihood(asked("loglikelihood", marked), disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_hf(models):
    texts = [(TEXT,), (TEXT * 4,), ("a",)]
    got, expected = (model.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) for model in models)
    assert got == pytest.approx(expected, rel=1e-5)


def test_completions_are_those_of_hf(models):
    ours, theirs = models
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    contexts = ["the cat", "seven dogs ran past two", "a"]
    got = ours.generate_until(asked("generate_until", [(context, settings) for context in contexts]))
    expected = theirs.generate_until(asked("generate_until", [(MARK + context, settings) for context in contexts]))
    assert got == [text.removesuffix(MARK) for text in expected]
    assert any(got)


def test_a_task_of_the_harness_gets_the_same_scores(models, tmp_path):
    words = TEXT.split()
    items = [{"q": " ".join(words[n : n + 4]), "choices": words[n + 4 : n + 7], "gold": n % 3} for n in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    scores = []
    for model, mark in zip(models, ("", MARK), strict=True):
        (tmp_path / "quiz.yaml").write_text(
            f"task: quiz\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}, "
            f"cache_dir: {tmp_path / 'cache'}}}\n"
            f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{mark}{{{{q}}}}'\n"
            "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
        )
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        result = simple_evaluate(model=model, tasks=["quiz"], task_manager=manager, bootstrap_iters=0)
        scores.append({name: value for name, value in result["results"]["quiz"].items() if name.startswith("acc")})
    assert scores[0] == scores[1]
    assert 0 <= scores[0]["acc,none"] <= 1
