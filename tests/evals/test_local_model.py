import itertools

import numpy as np
import pytest
import torch
from evaluation_stand_ins import model
from torch.nn.functional import log_softmax

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals import Generation, Likelihood, LocalModel, Prompt, RollingLikelihood, Shot
from lightning_lm.evals.encoding import Encoder, ScoredText
from lightning_lm.evals.shared_prefixes import plan_batches
from lightning_lm.tokenizers import ByteTokenizer

SHOTS = tuple(Shot(f"Question {index}: which letter comes next?", f" Answer {index}") for index in range(5))


def naive(model, ids, num_targets):
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).double()[0]
    logprobs = log_softmax(logits, -1)[-num_targets:]
    targets = torch.tensor(ids[-num_targets:])
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def requests():
    few_shot = [Prompt(f"What is {word}?", SHOTS) for word in ("this", "that thing over there", "it")]
    prompts = [*few_shot, Prompt("alone "), Prompt("alone and unlike the others"), Prompt("")]
    choices = ((" A", " B"), (" yes", " yes indeed", " no"), ("x",))
    return [
        Likelihood(prompt, choice)
        for prompt, choices_of_it in zip(prompts, itertools.cycle(choices))
        for choice in choices_of_it
    ]


@pytest.mark.parametrize("settings", [{}, {"window": 8}, {"logit_softcap": 5.0}])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_of_whole_rows_in_float64(settings, batch_size):
    lm, tokenizer = model(**settings), ByteTokenizer()
    asked = requests()
    answers = LocalModel(lm, tokenizer, batch_size=batch_size).log_likelihoods(asked)
    for request, answer in zip(asked, answers, strict=True):
        (row,) = Encoder(tokenizer).likelihood(request)
        expected, greedy = naive(lm.eval(), row.ids.tolist(), row.num_targets)
        assert answer.logprob == pytest.approx(expected, abs=2e-4)
        assert answer.is_greedy == greedy
        assert answer.num_tokens == row.num_targets


def test_a_model_of_transformers_gives_the_scores_of_its_own_logits():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = LlamaForCausalLM(
        LlamaConfig(vocab_size=260, max_position_embeddings=512, initializer_range=0.5, **sizes)
    ).eval()
    asked, tokenizer = requests(), ByteTokenizer()
    answers = LocalModel(lm, tokenizer, batch_size=4).log_likelihoods(asked)
    for request, answer in zip(asked, answers, strict=True):
        (row,) = Encoder(tokenizer).likelihood(request)
        expected, greedy = naive(lambda ids: lm(ids).logits, row.ids.tolist(), row.num_targets)
        assert (answer.logprob, answer.is_greedy) == (pytest.approx(expected, abs=2e-4), greedy)


def test_examples_that_many_prompts_begin_with_are_read_once():
    lm, read = model(), []
    lm.embed.register_forward_pre_hook(lambda module, given: read.append(given[0].numel()))
    asked = [
        Likelihood(Prompt(f"Which is number {index:02}?", SHOTS), choice)
        for index in range(20)
        for choice in (" A", " B")
    ]
    LocalModel(lm, ByteTokenizer(), batch_size=8).log_likelihoods(asked)
    whole = sum(len(request.prompt.text) + 1 for request in asked)
    assert sum(read) < whole / 12


def test_trunks_are_those_that_leave_the_fewest_tokens():
    generator = np.random.default_rng(0)
    trunks = [generator.integers(0, 50, 64) for _ in range(3)]
    rows = [
        ScoredText(np.concatenate([trunk, generator.integers(0, 50, 10)]).astype(np.uint32), 1)
        for trunk in trunks
        for _ in range(6)
    ]
    rows += [ScoredText(generator.integers(0, 50, 30).astype(np.uint32), 1) for _ in range(4)]
    batches = plan_batches(rows, 100, sharing=True, pass_cost=16)
    assert sorted(batch.trunk for batch in batches) == [0, 64, 64, 64]
    assert sorted(row for batch in batches for stem in batch.stems for row in stem.rows) == list(range(len(rows)))


def test_white_space_at_the_border_belongs_to_the_continuation():
    encoder = Encoder(ByteTokenizer())
    (left,) = encoder.likelihood(Likelihood(Prompt("The answer: "), "x"))
    (right,) = encoder.likelihood(Likelihood(Prompt("The answer:"), " x"))
    assert left.ids.tolist() == right.ids.tolist()
    assert left.num_targets == right.num_targets == 2


def test_a_long_prompt_loses_whole_examples_from_the_left_and_then_its_beginning():
    tokenizer = ByteTokenizer()
    request = Likelihood(Prompt("What?", SHOTS), " A")
    last_two = Prompt("What?", SHOTS[3:])
    (row,) = Encoder(tokenizer, max_length=len(last_two.text) + 10).likelihood(request)
    assert (row.dropped_shots, row.is_truncated) == (3, False)
    assert tokenizer.decode(row.ids[1:]) == last_two.text + " A"
    (row,) = Encoder(tokenizer, max_length=4).likelihood(request)
    assert (row.dropped_shots, row.is_truncated) == (5, True)
    assert tokenizer.decode(row.ids) == "at? A"


@pytest.mark.parametrize(("length", "count"), [(1024, 10), (10_000, 1), (9_999, 2)])
def test_each_token_of_a_long_text_is_a_target_once_and_the_last_window_has_full_context(length, count):
    text = "".join(chr(97 + index % 26) for index in range(10_000))
    rows = Encoder(ByteTokenizer(), max_length=length).rolling(RollingLikelihood(text))
    assert len(rows) == count
    assert sum(row.num_targets for row in rows) == 10_000
    assert all(len(row.ids) == length + 1 for row in rows)
    scored = np.concatenate([row.ids[-row.num_targets :] for row in rows])
    assert ByteTokenizer().decode(scored) == text


def test_rolling_scores_are_those_of_the_windows():
    lm, tokenizer, text = model(context_length=32), ByteTokenizer(), "a text of more than one window " * 3
    (answer,) = LocalModel(lm, tokenizer).log_likelihoods([RollingLikelihood(text)])
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    starts = list(range(1, len(ids), 32))
    expected = 0.0
    for start in starts:
        end = min(start + 32, len(ids))
        expected += naive(lm.eval(), ids[end - 33 : end], end - start)[0]
    assert answer.logprob == pytest.approx(expected, abs=1e-3)
    assert answer.num_tokens == len(text)


def test_modes_random_state_and_training_flags_are_as_before():
    lm = model()
    lm.train()
    lm.layers[0].eval()
    modes, state = [part.training for part in lm.modules()], torch.get_rng_state()
    LocalModel(lm, ByteTokenizer()).log_likelihoods(requests())
    assert [part.training for part in lm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_completions_stop_and_count_what_was_dropped():
    lm, tokenizer = model(context_length=64), ByteTokenizer()
    asked = [
        Generation(Prompt("Go on", SHOTS), max_new_tokens=8),
        Generation(Prompt("Go"), max_new_tokens=8, num_samples=2),
    ]
    long, short = LocalModel(lm, tokenizer).generate(asked)
    assert (long.dropped_shots, long.is_truncated, len(long.texts)) == (4, False, 1)
    assert len(short.texts) == 2
    assert short.texts[0] == short.texts[1]
    with pytest.raises(ConfigurationError, match="leaves no room"):
        LocalModel(lm, tokenizer).generate([Generation(Prompt("Go"), max_new_tokens=64)])


def test_what_cannot_be_asked_is_refused():
    lm, tokenizer = model(), ByteTokenizer()
    with pytest.raises(DataError, match="empty"):
        LocalModel(lm, tokenizer).log_likelihoods([Likelihood(Prompt("What?"), "")])
    with pytest.raises(ConfigurationError, match="no chat template"):
        LocalModel(lm, tokenizer, chat=True)
    with pytest.raises(ConfigurationError, match="hidden"):
        LocalModel(torch.nn.Linear(1, 1), tokenizer)


def test_a_chat_template_writes_the_turns_and_the_answer_begins_where_it_ends():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = ByteTokenizer().with_chat_template(template)
    (row,) = Encoder(tokenizer, chat=True).likelihood(Likelihood(Prompt("Q", (Shot("q", " a"),), "Be brief."), " A"))
    assert tokenizer.decode(row.ids) == "<system>Be brief.\n<user>q\n<assistant>a\n<user>Q\n<assistant>A"
    assert row.num_targets == 1


def test_rows_of_one_context_keep_to_the_batch_size():
    rows = [ScoredText(np.array([7, *range(length)], dtype=np.uint32), length) for length in range(2, 12)]
    batches = plan_batches(rows, 3, sharing=True, pass_cost=64)
    assert max(sum(len(stem.rows) for stem in batch.stems) for batch in batches) <= 3
    assert sorted(row for batch in batches for stem in batch.stems for row in stem.rows) == list(range(10))


def test_the_choices_of_an_item_keep_the_same_examples_as_the_longest_of_them():
    tokenizer, prompt = ByteTokenizer(), Prompt("What?", SHOTS)
    short, long = " A", " " + "a long answer that needs the room of two examples, and then some" * 2
    length = 1 + len(Prompt("What?", SHOTS[4:]).text + long) - 1
    encoder = Encoder(tokenizer, max_length=length)
    (alone,) = encoder.likelihood(Likelihood(prompt, short))
    assert alone.dropped_shots == 2
    for asked in (
        [Likelihood(prompt, short), Likelihood(prompt, long)],
        [Likelihood(prompt, long), Likelihood(prompt, short)],
    ):
        rows = [row for (row,) in encoder.rows(asked)]
        assert [row.dropped_shots for row in rows] == [4, 4]
        assert [tokenizer.decode(row.ids[1:]) for row in rows] == [
            Prompt("What?", SHOTS[4:]).text + request.continuation for request in asked
        ]
    # The names that fill a gap make two prompts of one item.
    other = Prompt("What" * 30 + "?", SHOTS)
    rows = encoder.rows(
        [Likelihood(prompt, short, group="1"), Likelihood(other, short, group="1"), Likelihood(prompt, short)]
    )
    assert [row.dropped_shots for (row,) in rows] == [4, 4, 2]
