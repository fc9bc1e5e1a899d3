"""The published tasks beside lm-evaluation-harness, which reads its own YAML on the same local files."""

import json
from pathlib import Path

import lm_eval
import pytest
import torch
from evals.tasks.small_data import write_lines

from lightning_lm.evals import LocalModel, evaluate_tasks
from lightning_lm.evals.requests import Generation
from lightning_lm.evals.tasks import by_name
from lightning_lm.evals.tasks.choice import best_choices
from lightning_lm.tokenizers import PretrainedTokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "ran", "past", "two", "red", "houses", "and"]


def words(start, number):
    return " ".join(WORDS[(start * 5 + step * 3) % len(WORDS)] for step in range(number))


def records():
    mmlu = [
        {
            "question": f" {words(n, 6)}? ",
            "choices": [words(n + k, 2) for k in range(4)],
            "answer": n % 4,
            "subject": "law",
        }
        for n in range(4)
    ]
    swag = [
        {
            "activity_label": "Baking",
            "ctx_a": f"{words(n, 5)} [title] Go",
            "ctx_b": f"she {words(n, 2)}",
            "endings": [f"[step] {words(n + k, 3 + k)}." for k in range(4)],
            "label": n % 4,
        }
        for n in range(4)
    ]
    arc = [
        {
            "question": f"{words(n, 6)}?",
            "choices": {"text": [words(n + k, k + 1) for k in range(4)], "label": [*"ABCD"]},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(4)
    ]
    lambada = [{"text": words(n, 9)} for n in range(4)]
    gsm = [{"question": f"{words(n, 6)}?", "answer": f"It is {n}.\n#### {n}"} for n in range(4)]
    return {"mmlu": mmlu, "hellaswag": swag, "arc_easy": arc, "lambada": lambada, "gsm8k": gsm}


SOURCES = {
    "mmlu": ("mmlu/default/_default_template_yaml", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
}
SHOTS = {"mmlu": 2, "gsm8k": 2}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folder of the data, model, and the samples of the harness with a tiny model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("parity")
    published = Path(lm_eval.__file__).parent / "tasks"
    for name, rows in records().items():
        source, split = SOURCES[name]
        shots = "dev" if name == "mmlu" else "train"
        files = {split: write_lines(folder / name / f"{split}.jsonl", rows)}
        examples = [{**row, "question": "Q"} if "question" in row else row for row in rows[:3]]
        files[shots] = write_lines(folder / name / f"{shots}.jsonl", examples)
        lines = {
            "include": str(published / source),
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {key: str(path) for key, path in files.items()}},
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": SHOTS.get(name, 0),
            "tag": None,
        }
        if name == "gsm8k":
            lines["generation_kwargs"] = {
                "until": ["Question:", "</s>", "<|im_end|>"],
                "do_sample": False,
                "max_gen_toks": 8,
            }
        if name == "mmlu":
            lines["description"] = "The following are multiple choice questions (with answers) about law.\n\n"
        (folder / f"{name}.yaml").write_text(json.dumps(lines))  # JSON is YAML
    alphabet = {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
    tokens = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=1024, initializer_range=0.5, **sizes)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="</s>")
    model = HFLM(pretrained=LlamaForCausalLM(config).eval(), tokenizer=tokenizer, batch_size=8)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=[f"own_{name}" for name in SOURCES], task_manager=manager, bootstrap_iters=0
    )
    return folder, model, found["samples"]


def harness(samples, name):
    rows = [row for row in samples[f"own_{name}"] if row["filter"] in ("none", "strict-match")]
    return sorted(rows, key=lambda row: row["doc_id"])


@pytest.mark.parametrize("name", ["mmlu", "hellaswag", "arc_easy", "lambada", "gsm8k"])
def test_prompts_and_predictions_are_those_of_the_harness(both, name):
    folder, _, samples = both
    task = by_name(name, data=folder, shots=SHOTS.get(name, 0))
    rows = harness(samples, name)
    assert len(rows) == len(task.items()) == 4
    for item, row in zip(task.items(), rows, strict=True):
        asked = [
            (request.prompt.text,) if isinstance(request, Generation) else (request.prompt.text, request.continuation)
            for request in item.requests
        ]
        given = [argument[: len(asked[0])] for argument in map(tuple, arguments_of(row))]
        assert asked == given
        if name in ("mmlu", "hellaswag", "arc_easy"):
            logprobs = [float(answer[0]) for answer in row["filtered_resps"]]
            (best,) = best_choices(logprobs)
            assert row["acc"] == float(best == item.gold)
            lengths = [len(request.continuation) - 1 for request in item.requests]
            (best,) = best_choices([value / length for value, length in zip(logprobs, lengths, strict=True)])
            assert row.get("acc_norm", float(best == item.gold)) == float(best == item.gold)


def arguments_of(row):
    arguments = row["arguments"]
    return [list(each.values()) for each in arguments.values()] if isinstance(arguments, dict) else arguments


@pytest.mark.parametrize("name", ["lambada", "gsm8k"])
def test_a_models_answers_are_those_that_the_harness_gets(both, name):
    folder, peer, samples = both
    config = json.dumps({"eos_token": "</s>"})
    tokenizer = PretrainedTokenizer(peer.tokenizer.backend_tokenizer.to_str(), config=config)
    model = LocalModel(peer.model, tokenizer, batch_size=3)
    settings = {"max_new_tokens": 8} if name == "gsm8k" else {}
    task = by_name(name, data=folder, shots=SHOTS.get(name, 0), **settings)
    items, rows = evaluate_tasks([task], model)[name].items, harness(samples, name)
    if name == "lambada":
        for item, row in zip(items, rows, strict=True):
            ((logprob, is_greedy),) = row["filtered_resps"]
            assert item.scores["logprob"] == pytest.approx(float(logprob), abs=1e-3)
            assert item.scores["acc"] == row["acc"] == float(is_greedy in (True, "True"))
        return
    texts = [answer.texts[0] for answer in model.generate([item.requests[0] for item in task.items()])]
    assert texts == [row["resps"][0][0] for row in rows]
    assert [item.scores["strict_match"] for item in items] == [row["exact_match"] for row in rows]
