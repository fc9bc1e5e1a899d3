"""The engine against `Generator`: a completion is what its prompt gets alone, whoever else is in the batch."""

import random
import threading
from collections import deque

import pytest
import torch
from engine_requests import GREEDY, Letters, OnlyLogits, ids_of, requests_and_results, run, tiny_model

from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.prefix_cache import PrefixCache
from lightning_lm.models.positions import LearnedPositions
from lightning_lm.serving import Engine, EngineStopped, QueueFull, TimedOut
from lightning_lm.serving.scheduler import ContinuousBatch


def random_cases(count, longest, seed=0):
    source = random.Random(seed)
    shared = tuple(source.randrange(26) for _ in range(20))
    for index in range(count):
        own = tuple(source.randrange(26) for _ in range(source.randint(1, longest)))
        prompt = own if index % 2 else (*shared, *own)
        yield {"prompt_ids": prompt, "max_new_tokens": source.randint(1, 16)}


@pytest.mark.parametrize(
    ("model", "prefix_bytes"),
    [
        (tiny_model(), 0),
        (tiny_model(attention={"window": 5}), 1 << 20),
        (tiny_model(positions=LearnedPositions(), context_length=60), 1 << 20),
    ],
    ids=["plain", "window", "learned positions"],
)
def test_greedy_completions_do_not_depend_on_the_batch(model, prefix_bytes):
    cases = list(random_cases(10, 25))
    with Engine(model, Letters(), max_batch=4, prefix_bytes=prefix_bytes).running() as engine:
        assert engine.is_continuous
        results = run(engine, [dict(case) for case in cases])
    for case, updates in zip(cases, results, strict=True):
        alone = Generator(model, Letters()).generate(
            [case["prompt_ids"]], sampling=GREEDY, max_new_tokens=case["max_new_tokens"]
        )[0]
        assert ids_of(updates) == alone.token_ids
        assert "".join(update.text for update in updates) == alone.text
        assert updates[-1].finish_reason == "length"


def test_long_prompts_are_read_in_parts_beside_rows_that_are_decoded():
    model = tiny_model(context_length=2048)
    prompts = [tuple(range(26)) * 30, (1, 2, 3), tuple(range(25, -1, -1)) * 22]
    with Engine(model, Letters(), prefix_bytes=1 << 20).running() as engine:
        results = run(engine, [{"prompt_ids": ids, "max_new_tokens": 12} for ids in prompts])
        again = run(engine, [{"prompt_ids": ids, "max_new_tokens": 12} for ids in prompts])
    for ids, first, second in zip(prompts, results, again, strict=True):
        (alone,) = Generator(model, Letters()).generate([ids], sampling=GREEDY, max_new_tokens=12)
        assert ids_of(first) == ids_of(second) == alone.token_ids


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(seed=3),
        Sampling(seed=4, temperature=0.7, top_k=5),
        Sampling(seed=5, top_p=0.8),
        Sampling(seed=6, repetition_penalty=1.3, frequency_penalty=0.5),
    ],
)
def test_samples_are_those_of_the_generator_whoever_else_is_there(settings):
    model = tiny_model()
    cases = [{"prompt_ids": (1, 2, 3), "sampling": settings, "sample": sample} for sample in range(3)]
    others = [{**case, "sampling": Sampling(seed=9, temperature=1.5)} for case in random_cases(4, 9)]
    with Engine(model, Letters(), max_batch=4).running() as engine:
        results = run(engine, [*others[:2], *cases, *others[2:]])[2:5]
    expected = Generator(model, Letters()).generate([(1, 2, 3)], sampling=settings, max_new_tokens=8, num_samples=3)
    assert [ids_of(updates) for updates in results] == [completion.token_ids for completion in expected]


@pytest.mark.parametrize("wrap", [lambda model: model, OnlyLogits], ids=["continuous", "static"])
def test_log_probabilities_of_prompt_and_completion(wrap):
    model = tiny_model()
    prompt = tuple(range(12))
    case = {"prompt_ids": prompt, "max_new_tokens": 4, "top_logprobs": 3, "prompt_logprobs": True}
    with Engine(wrap(model), Letters()).running() as engine:
        assert engine.is_continuous == (wrap is not OnlyLogits)
        with_bias = {"prompt_ids": (4,), "top_logprobs": 1, "logit_bias": {7: 100.0}, "max_new_tokens": 2}
        updates, nothing_new, biased = run(engine, [case, {**case, "max_new_tokens": 0}, with_bias])
    ids = (*prompt, *ids_of(updates))
    expected = model(torch.tensor([ids])).double().log_softmax(-1)[0]
    scored = [*updates[0].prompt_logprobs, *(token for update in updates for token in update.logprobs)]
    assert scored[0] is None
    assert [token.token_id for token in scored[1:]] == list(ids[1:])
    for place, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(expected[place, token.token_id].item(), abs=1e-4)
        best, places = expected[place][: Letters.vocab_size].topk(3)  # the model has more ids
        assert [entry for entry, _ in token.top] == places.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert nothing_new[0].prompt_logprobs == updates[0].prompt_logprobs
    assert ids_of(nothing_new) == ()
    assert ids_of(biased) == (7, 7)
    of_model = model(torch.tensor([[4, 7]])).log_softmax(-1)[0, :, 7]
    assert [update.logprobs[0].logprob for update in biased] == pytest.approx(of_model.tolist(), abs=1e-4)


def test_stop_strings_and_ids_end_a_completion():
    model = tiny_model()
    (alone,) = Generator(model, Letters()).generate([(1, 2, 3)], sampling=GREEDY, max_new_tokens=12)
    third = alone.token_ids[2]
    stop = alone.text[3:5]
    with Engine(model, Letters()).running() as engine:
        by_text, by_id = run(
            engine,
            [
                {"prompt_ids": (1, 2, 3), "stop_strings": (stop,), "max_new_tokens": 12},
                {"prompt_ids": (1, 2, 3), "stop_ids": [third], "max_new_tokens": 12},
            ],
        )
    assert "".join(update.text for update in by_text) == alone.text.split(stop)[0]
    assert ids_of(by_id) == alone.token_ids[: alone.token_ids.index(third) + 1]
    assert by_text[-1].finish_reason == by_id[-1].finish_reason == "stop"


def test_full_queue_cancellation_time_limit_and_the_end():
    model = tiny_model(context_length=100_000)
    long = {"prompt_ids": (1,), "max_new_tokens": 50_000}
    ((first, updates, ended), (second, _, _), (third, _, _), (late, late_updates, is_late)) = requests_and_results(
        [dict(long), dict(long), dict(long), {**long, "deadline_s": 0.0}]
    )
    begun = threading.Event()
    deliver, first.deliver = first.deliver, lambda update: (deliver(update), begun.set())
    with Engine(model, Letters(), max_batch=1, max_waiting=1).running() as engine:
        engine.submit(first)
        assert begun.wait(30)
        engine.submit(second)
        with pytest.raises(QueueFull, match="1 requests wait already"):
            engine.submit(third)
        engine.cancel(second, first)
        engine.submit(late)  # the place of the cancelled ones is free
        assert is_late.wait(30)
        assert isinstance(late_updates[0].error, TimedOut)
        (left, left_updates, was_left) = requests_and_results([dict(long)])[0]
        engine.submit(left)
    assert was_left.is_set()
    assert isinstance(left_updates[-1].error, EngineStopped)
    assert not ended.is_set()
    assert not updates[-1].is_last
    with pytest.raises(EngineStopped):
        engine.submit(third)


def test_new_weights_come_between_requests_and_drop_what_was_cached():
    model, other = tiny_model(0), tiny_model(1)
    case = {"prompt_ids": tuple(range(26)) * 2, "max_new_tokens": 6}
    with Engine(model, Letters()).running() as engine:
        (before,) = run(engine, [dict(case)])
        engine.change(lambda: model.load_state_dict(other.state_dict()))
        (after,) = run(engine, [dict(case)])
    (expected,) = Generator(other, Letters()).generate([case["prompt_ids"]], sampling=GREEDY, max_new_tokens=6)
    assert ids_of(after) == expected.token_ids != ids_of(before)


def test_logits_that_are_not_numbers_fail_their_own_request_only():
    model = tiny_model()
    with torch.no_grad():
        model.embed.weight[25] = torch.nan
    with Engine(model, Letters()).running() as engine:
        bad, good = run(engine, [{"prompt_ids": (25,)}, {"prompt_ids": (1, 2)}])
    assert isinstance(bad[-1].error, ConfigurationError)
    assert good[-1].finish_reason == "length"


def test_prefix_cache_compares_tokens_and_drops_the_oldest():
    def block(first, end):
        return [(torch.zeros(1, end - first, 2), torch.zeros(1, end - first, 2))]

    cache = PrefixCache(3 * 64, block_size=4)
    cache.store(range(8), block)
    assert len(cache.find(range(9))) == 2
    assert len(cache.find(range(8))) == 1  # the last token is always read
    assert cache.find([9, *range(1, 8), 8]) == []
    assert cache.find([*range(4, 8), 0]) == []  # the second block is found behind the first only
    cache.store([*range(4), *range(20, 28)], block)
    assert len(cache.find([*range(4), *range(20, 29)])) == 3
    assert len(cache.find(range(9))) == 1
    assert cache.num_bytes == 3 * 64
    cache.store(range(100, 140), block)  # longer than the cache: its beginning stays
    assert len(cache.find(range(100, 140))) == 3


@pytest.mark.parametrize(("scored", "left"), [(False, 1), (True, 0)])
def test_equal_beginnings_wait_for_each_other_only_if_the_second_can_use_the_first(scored, left):
    batch = ContinuousBatch(tiny_model(), Letters(), max_rows=4, prefix_bytes=1 << 20, cache_bytes=1 << 30)
    top = 0 if scored else None
    cases = [{"prompt_ids": (1,) * 40, "prompt_logprobs": scored, "top_logprobs": top} for _ in range(2)]
    waiting = deque(request for request, _, _ in requests_and_results(cases))
    with torch.inference_mode():
        batch.step(waiting)
    assert len(waiting) == left
