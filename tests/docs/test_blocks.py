"""Every block of code and every command of the documentation is run, in small, in the order of its page.

A comment before a block changes that: `<!-- test: parse -->` only parses the options, for what needs a GPU, a cluster,
a network or much time, waits for somebody, or is run elsewhere; `<!-- test: tiny=sft -->` names the overlay that makes
a YAML file small. A file that a block gives a title is written, for the commands after it.
Reading a configuration takes seconds, so options that are only parsed are read together, once for each recipe. Tables
of options take part: `<!-- options: grpo/reverse -->` stands before them.
"""

import argparse
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gym_library  # noqa: F401 - pages use Reasoning Gym, or a stand-in where it is missing
import pytest
import yaml

from lightning_lm.cli import _VERBS, main
from lightning_lm.cli.recipes import find_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
FENCE = re.compile(
    r"(?:^[ ]*<!-- test: (?P<mark>[^>]*?) -->\n\n?)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
TABLE = re.compile(r"^<!-- options: (?P<recipe>\S+) -->\n\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
OTHERS = {
    "python",
    "python3",
    "pip",
    "source",
    "git",
    "tensorboard",
    "cd",
    "export",
    "sbatch",
    "hf",
    "vllm",
    "bash",
    "curl",
    "mkdir",
    "srun",
    "pytest",
}
"""Programs that pages name and the test does not run."""
TRAINED = ("fit", "validate", "test", "predict", "profile", "sweep")
SMALL = (
    "trainer: {max_steps: 2, max_epochs: -1, val_check_interval: 1, limit_val_batches: 1, log_every_n_steps: 1, "
    "accelerator: cpu, precision: 32-true}\n"
)
FEW = "data: {train: {num_examples: 16}, validation: {num_examples: 4}, batch_size: 4}\n"
OVERLAYS = {
    "pretrain": SMALL
    + "model: {model: {d_model: 32, num_layers: 1, context_length: 32}}\n"
    + "data: {train: corpus, tokenizer: {vocab_size: 280}, context_length: 32, batch_size: 4}\n",
    "sft": SMALL + FEW + "model: {model: {d_model: 32, num_layers: 1}}\n",
    "preference": SMALL + FEW,
    "rollouts": SMALL + FEW.replace("4}\n", "2}\n") + "model: {plan: {samples_per_prompt: 2, max_new_tokens: 3}}\n",
    "chat": SMALL + "data: {rows: {context_length: 64}, batch_size: 4}\n",
    "own": SMALL,
    "sweep": "trainer: {accelerator: cpu, limit_val_batches: 2}\nmodel: {model: {context_length: 32}}\n"
    + "data: {train: corpus, context_length: 32, batch_size: 16}\n"
    + "sweep: {flops: [1.5e+8, 3.0e+8, 6.0e+8], held_out_flops: 1.0e+9, models: [{model.model.d_model: 8}, "
    + "{model.model.d_model: 16}, {model.model.d_model: 32}]}\n",
}
FAMILIES = {
    "sft/chat": "chat",
    "sft": "sft",
    "dpo": "preference",
    "kto": "preference",
    "reward": "preference",
    "grpo/gsm8k": "gsm8k",
}
FAMILIES |= {
    "grpo": "rollouts",
    "ppo": "rollouts",
    "expert_iteration": "rollouts",
    "pretrain": "pretrain",
    "scaling": "sweep",
}
TINY_PYTHON = {r"d_model=\d+": "d_model=32", r"num_layers=\d+": "num_layers=1", r"max_steps=\d+": "max_steps=1"}
WORDS = ("the", "model", "reads", "a", "line", "and", "says", "what", "follows", "it")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Block(NamedTuple):
    """One fenced block."""

    mark: str
    language: str
    title: str
    body: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.body.replace("\\\n", " ").splitlines()
        return [bare(words) for line in lines if (words := shlex.split(line, comments=True))]


def bare(words: list[str]) -> list[str]:
    """Return a command without variables and launcher before it."""
    words = words[next((place for place, word in enumerate(words) if "=" not in word), len(words)) :]
    return ["lightning-lm", *words[words.index("lightning_lm.cli") + 1 :]] if "lightning_lm.cli" in words else words


def blocks(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["rest"])
        body = textwrap.dedent(match["body"])
        found.append(Block((match["mark"] or "").strip(), match["language"], title[1] if title else "", body))
    return found


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files that pages name: a corpus, conversations, word problems, preferences, a Hugging Face folder."""
    from lightning_lm.models import TransformerConfig, save_huggingface
    from lightning_lm.tokenizers import BPETokenizer, PretrainedTokenizer

    folder = tmp_path_factory.mktemp("materials")
    (folder / "corpus").mkdir()
    texts = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 60)) for number in range(30)]
    for number, text in enumerate(texts):
        (folder / "corpus" / f"{number}.txt").write_text(f"def main({number}): {text}")
    write = lambda name, rows: (folder / name).write_text("\n".join(map(json.dumps, rows)))  # noqa: E731
    user, assistant = ([{"role": role, "content": "the model reads a line"}] for role in ("user", "assistant"))
    turns = lambda number: [user[0] | {"content": f"line {number}"}, *assistant]  # noqa: E731
    write("chats.jsonl", [{"messages": turns(number)} for number in range(24)])
    write("pairs.jsonl", [{"prompt": f"{n}2=", "chosen": f"2{n}", "rejected": f"{n}2"} for n in range(3, 10)])
    problems = [{"question": f"{a} + 2?", "answer": f"{a} + 2 = {a + 2}\n#### {a + 2}"} for a in range(8)]
    write("train.jsonl", problems)
    write("test.jsonl", problems[:2])
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trained = BPETokenizer.train(texts, 300, special_tokens=special, show_progress=False)
    config = json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    tokenizer = PretrainedTokenizer(trained.to_files()["tokenizer.json"], config=config)
    model = TransformerConfig(vocab_size=tokenizer.vocab_size, d_model=32, num_layers=1, context_length=128).build()
    save_huggingface(model, folder / "SmolLM2-135M", tokenizer)
    return folder


@pytest.fixture
def workplace(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder that sees the materials."""
    for entry in materials.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    for name, overlay in OVERLAYS.items():
        (tmp_path / f"tiny_{name}.yaml").write_text(overlay)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]  # another page has a module of the same name


def family(config: str) -> str:
    """Return the name of the overlay that makes a recipe, or a file that names one as its base, small."""
    path = find_recipe(config) or Path(config)
    for name, overlay in FAMILIES.items():
        if config.removeprefix("recipes/").startswith(name):
            return overlay
    base = (yaml.safe_load(path.read_text()) or {}).get("base", [])
    bases = [base] if isinstance(base, str) else base
    return next((family(name) for name in bases if not name.startswith("base/")), "own")


def run_command(words: list[str], mark: str) -> None:
    verb, rest = words[1], words[2:]
    if any(word == "--help" or word.endswith(".help") for word in rest):
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(main(words[1:]))
        assert not ended.value.code, shlex.join(words)
    elif verb in TRAINED and verb != "sweep" and is_parsed(words, mark):
        assert "--config" in rest, f"{shlex.join(words)}: its options are tried by test_options_exist, for its --config"
    elif mark != "parse":
        assert main([verb, *(shrunk(verb, rest, mark) if verb in TRAINED else rest)]) == 0, shlex.join(words)
    else:
        parser, module = argparse.ArgumentParser(prog=verb), importlib.import_module(_VERBS[verb].module)
        module.add_arguments(parser)
        unknown = parser.parse_known_args(rest)[1]
        assert not unknown or getattr(module, "TAKES_SETTINGS", False), f"{shlex.join(words)}: {unknown}"


def is_parsed(words: list[str], mark: str) -> bool:
    return mark == "parse" or "--print_config" in words


def print_config(words: list[str]) -> None:
    try:
        status = main(["fit", *words, "--print_config"])
    except SystemExit as ended:
        status = ended.code or 0
    assert status == 0, shlex.join(words)


def shrunk(verb: str, words: list[str], mark: str) -> list[str]:
    """Return the words of a command, made small by an overlay after its last recipe."""
    if "--config" not in words or any(word.endswith("help") for word in words):
        return words
    at = len(words) - words[::-1].index("--config")
    overlay = mark.partition("tiny=")[2] or family(words[words.index("--config") + 1])
    small = [*words[: at + 1], "--config", f"tiny_{overlay}.yaml", *words[at + 1 :]]
    for name, value in (("--trainer.max_steps", "3"), ("--trainer.val_check_interval", "1")):
        if name in small:
            small[small.index(name) + 1] = value
    return small


def run_block(block: Block, names: dict, page: Path) -> None:
    if block.title:
        Path(block.title).write_text(block.body)
    if block.language == "python":
        code = block.body
        for real, tiny in TINY_PYTHON.items():
            code = re.sub(real, tiny, code)
        compiled = compile(code, f"{page.name}: {block.body.splitlines()[0]}", "exec")
        if block.mark != "parse":
            exec(compiled, names)
    elif block.language == "yaml" and block.title:
        if not any(f"--{name} {block.title}" in page.read_text(encoding="utf-8") for name in ("config", "tasks")):
            print_config(["--config", block.title])
    elif block.language == "bash":
        for words in block.commands:
            if words and words[0].endswith("lightning-lm"):
                run_command(words, block.mark)
            else:
                assert not words or words[0] in OTHERS or words[0].startswith(".venv/bin/"), words
    else:
        assert block.language in ("text", "yaml", "bash", "json", "svg"), f"{page}: {block.language} is not tested"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(DOCS).as_posix()
)
def test_the_blocks_of_a_page_run(page, workplace):
    names: dict = {"__name__": "page"}
    for block in blocks(page):
        try:
            run_block(block, names, page)
        except BaseException as error:
            error.add_note(f"In {page.relative_to(DOCS)}, this block:\n{block.body}")
            raise


def options_by_recipe() -> dict[str, list[list[str]]]:
    """Return the options that pages show and that are only parsed, command by command, for each recipe."""
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        for block in blocks(page):
            for words in block.commands if block.language == "bash" else ():
                reads = words[:1] == ["lightning-lm"] and words[1] in ("fit", "profile", "validate", "test")
                if reads and is_parsed(words, block.mark) and not words[3].endswith(".yaml"):
                    found.setdefault(words[3], []).append(words[4:])
        for match in TABLE.finditer(page.read_text(encoding="utf-8")):
            spans = [
                shlex.split(span)
                for span in re.findall(r"`(--(?:trainer|model|data|seed)[^`]+)`", match["rows"].replace("\\|", "|"))
            ]
            found.setdefault(match["recipe"], []).extend(words for words in spans if "..." not in words)
    return {recipe: [options(words) for words in commands] for recipe, commands in found.items()}


def batches(commands: list[list[str]]) -> list[list[str]]:
    """Return few lists of options with all of them, none of which sets a key twice."""
    found: list[list[str]] = []
    for words in commands:
        batch = next((batch for batch in found if not collide(batch, words)), None)
        if batch is None:
            found.append(batch := [])
        batch += words
    return found


def collide(some: list[str], others: list[str]) -> bool:
    keys = [[word[2:].partition("+=")[0] for word in words if word.startswith("--")] for words in (some, others)]
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys[0] for b in keys[1])


def options(words: list[str]) -> list[str]:
    """Return the options of a command that configure a run."""
    kept = [word for word in words if word != "--print_config"]
    while "--ckpt_path" in kept:
        del kept[kept.index("--ckpt_path") : kept.index("--ckpt_path") + 2]
    return kept


@pytest.mark.parametrize("recipe", options_by_recipe())
def test_options_that_are_only_parsed_exist(recipe, workplace):
    for words in batches(options_by_recipe()[recipe]):
        print_config(["--config", recipe, *words])
