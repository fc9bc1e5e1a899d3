"""Single-turn environments with a stand-in of verifiers' interface: questions, rubrics, and what is refused."""

import sys
from types import SimpleNamespace

import pytest

from lightning_lm.data import EnvironmentPrompts
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.errors import ConfigurationError, MissingDependencyError
from lightning_lm.rewards import EnvironmentReward, score
from lightning_lm.tokenizers import CharacterTokenizer

ROWS = [
    {"prompt": [{"role": "user", "content": f"{n}+1="}], "answer": str(n + 1), "example_id": n, "info": None}
    for n in range(8)
]


class Parser:
    """Takes the answer from the last message."""

    def parse_answer(self, completion):
        return completion[-1]["content"].strip()


def right(parser, completion, answer, **kwargs):
    assert kwargs["state"]["prompt"] == kwargs["prompt"]
    assert kwargs["info"] == {}
    return 1.0 if parser.parse_answer(completion) == answer else 0.0


async def short(completion, example_id):
    return 1.0 - 0.1 * len(completion[0]["content"]) + example_id


def measured(completion):
    raise AssertionError("a function of weight 0 is not called")


def environment(**changes):
    """Return what verifiers' SingleTurnEnv has, as far as it is read."""
    rubric = SimpleNamespace(
        funcs=[right, short, measured], weights=[1.0, 0.5, 0.0], class_objects={"parser": Parser()}
    )
    made = SimpleNamespace(
        rubric=rubric,
        max_turns=1,
        tool_defs=None,
        eval_dataset=None,
        get_dataset=lambda: ROWS,
        get_eval_dataset=lambda: ROWS,
    )
    return SimpleNamespace(**{**vars(made), **changes})


def test_questions_are_the_rows_and_rewards_the_weighted_functions():
    env = environment()
    records = list(EnvironmentPrompts(env).records())
    assert records[3] == {"prompt": ROWS[3]["prompt"], "answer": "4", "example_id": 3}
    columns = {"answer": ["4", "4"], "example_id": [3, 3]}
    table = score(
        [EnvironmentReward(env)], [1.0], prompts=[ROWS[3]["prompt"]] * 2, completions=["4", " 55"], columns=columns
    )
    assert not table.failures
    assert table.totals.tolist() == pytest.approx([1 + 0.5 * 3.9, 0.5 * 3.7])


def test_a_text_prompt_has_a_text_as_completion():
    rubric = SimpleNamespace(funcs=[lambda prompt, completion: float(completion == prompt)], weights=[2.0])
    table = score(
        [EnvironmentReward(SimpleNamespace(rubric=rubric))], [1.0], prompts=["a", "b"], completions=["a", "a"]
    )
    assert table.totals.tolist() == [2.0, 0.0]


def test_an_environment_is_found_by_name(monkeypatch):
    made = []
    rubric = SimpleNamespace(funcs=[lambda completion, answer: float(completion == answer)], weights=[3.0])
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)]

    def load_environment(name, **arguments):
        made.append((name, arguments))
        return environment(rubric=rubric, get_dataset=lambda: rows)

    monkeypatch.setitem(sys.modules, "verifiers", SimpleNamespace(load_environment=load_environment, __spec__=object()))
    source = EnvironmentPrompts("sums", arguments={"most": 9})
    data = PromptDataModule(source, 0, tokenizer=CharacterTokenizer("0123456789+="), batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    answers = batch["columns"]["answer"]
    reward = EnvironmentReward("sums", arguments={"most": 9})
    completions = [*answers[:2], "no", "no"]
    table = score([reward], [1.0], prompts=batch["prompts"], completions=completions, columns=batch["columns"])
    assert table.totals.tolist() == [3.0, 3.0, 0.0, 0.0]
    assert made == [("sums", {"most": 9})]  # once for prompts and reward


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install verifiers==0\.1\.14"):
        EnvironmentPrompts("unknown").records()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 4}, "has max_turns=4, and completions are single"),
        ({"tool_defs": ["search"]}, r"has tools \(1\)"),
    ],
)
def test_several_turns_and_tools_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        EnvironmentPrompts(environment(**changes)).records()


def test_questions_to_train_on_are_never_given_as_held_out():
    with pytest.raises(ConfigurationError, match=r"no evaluation dataset.*--data.validation 0.1"):
        EnvironmentPrompts(environment(), held_out=True).records()
    held_out = environment(eval_dataset=ROWS[:2], get_eval_dataset=lambda: ROWS[:2])
    assert len(list(EnvironmentPrompts(held_out, held_out=True).records())) == 2


def test_a_function_of_groups_is_refused_by_name():
    def best_of(completions):
        return [1.0] * len(completions)

    rubric = SimpleNamespace(funcs=[best_of], weights=[1.0], class_objects={})
    table = score([EnvironmentReward(SimpleNamespace(rubric=rubric))], [1.0], prompts=["a"], completions=["b"])
    assert "best_of of the rubric scores all completions of a prompt together" in table.failures[0].reason
