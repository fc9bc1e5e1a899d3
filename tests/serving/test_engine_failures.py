"""Failures in the engine's steps end the requests that they concern, and nothing else."""

import gc
import random
import threading

import pytest
import torch
from engine_requests import GREEDY, Letters, OnlyLogits, ids_of, requests_and_results, run, tiny_model

from lightning_lm.generation import Generator
from lightning_lm.generation.slots import SlotForward
from lightning_lm.serving import (
    DoesNotFit,
    Engine,
    EngineStopped,
    GenerationFailed,
    GenerationRequest,
    OutOfMemory,
)


def alone(model, prompt, count=8):
    (completion,) = Generator(model, Letters()).generate([prompt], sampling=GREEDY, max_new_tokens=count)
    return completion.token_ids


class Refusing(Letters):
    """A tokenizer that cannot decode a prompt with the letter z."""

    def decode(self, ids):
        if 25 in ids:
            raise KeyError("z")
        return super().decode(ids)


def failing_at(model, width, error):
    """Let a model raise at passes over so many new tokens of a row."""
    hidden = model.hidden

    def fails(ids, **settings):
        if ids.shape[1] == width:
            raise error
        return hidden(ids, **settings)

    model.hidden = fails
    return model


def test_a_prompt_at_which_the_model_fails_fails_alone(caplog):
    model = failing_at(tiny_model(), 5, IndexError("index out of range in self"))
    with Engine(model, Letters(), max_batch=4).running() as engine:
        good, bad, other = run(engine, [{"prompt_ids": ids} for ids in [(1, 2, 3), (1, 2, 3, 4, 5), (6, 7)]])
        assert engine.is_alive
    assert isinstance(bad[-1].error, GenerationFailed)
    assert "IndexError: index out of range in self" in str(bad[-1].error)
    assert "index out of range" in caplog.text
    assert [ids_of(good), ids_of(other)] == [alone(tiny_model(), (1, 2, 3)), alone(tiny_model(), (6, 7))]


def test_a_step_that_fails_is_repeated_row_by_row_and_the_rows_that_fail_alone_end():
    model = tiny_model()
    hidden = model.hidden

    def fails(ids, **settings):
        if ids.shape == (3, 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        if ids.shape[1] == 1 and settings["cache"].length == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return hidden(ids, **settings)

    model.hidden = fails
    prompts = [(1, 2), (3,), (4, 5, 6, 7, 8)]
    made = requests_and_results([{"prompt_ids": ids, "max_new_tokens": 4} for ids in prompts])
    with Engine(model, Letters(), prefix_bytes=0).running() as engine:
        engine.submit(*(request for request, _, _ in made))
        assert all(done.wait(30) for _, _, done in made)
        (after,) = run(engine, [{"prompt_ids": (3,), "max_new_tokens": 4}])
    assert isinstance(made[2][1][-1].error, OutOfMemory)
    assert "--cache-memory" in str(made[2][1][-1].error)
    expected = [alone(tiny_model(), ids, 4) for ids in prompts]
    assert [ids_of(updates) for _, updates, _ in made[:2]] == expected[:2]
    assert ids_of(after) == expected[1]


@pytest.mark.parametrize("static", [False, True])
def test_a_tokenizer_that_fails_at_one_text_fails_one_request(static):
    model = tiny_model()
    with Engine(OnlyLogits(model) if static else model, Refusing(), max_batch=4).running() as engine:
        assert engine.is_continuous != static
        cases = [{"prompt_ids": (1, 2)}, {"prompt_ids": (25, 1)}, {"prompt_ids": (3,), "logit_bias": {25: 100.0}}]
        good, bad, later = run(engine, cases)
    assert ids_of(good) == alone(model, (1, 2))
    for updates in (bad, later):
        assert isinstance(updates[-1].error, GenerationFailed)
        assert "KeyError: 'z'" in str(updates[-1].error)


def test_a_model_without_cache_that_fails_ends_its_batch_and_serves_the_next():
    model = OnlyLogits(tiny_model())
    inner, calls = model.inner.forward, []

    def fails_once(ids):
        calls.append(ids)
        if len(calls) == 1:
            raise RuntimeError("the shapes do not match")
        return inner(ids)

    model.inner.forward = fails_once
    with Engine(model, Letters()).running() as engine:
        (bad,) = run(engine, [{"prompt_ids": (1, 2)}])
        (good,) = run(engine, [{"prompt_ids": (1, 2)}])
    assert "the shapes do not match" in str(bad[-1].error)
    assert ids_of(good) == alone(tiny_model(), (1, 2))


def test_a_client_whose_function_raises_harms_itself_only():
    def deliver(update):
        raise OSError("gone")

    (good, updates, done) = requests_and_results([{"prompt_ids": (1, 2)}])[0]
    broken = GenerationRequest(prompt_ids=(3, 4), deliver=deliver, ends=good.ends)
    with Engine(tiny_model(), Letters()).running() as engine:
        engine.submit(broken, good)
        assert done.wait(30)
    assert broken.is_done
    assert ids_of(updates) == alone(tiny_model(), (1, 2))


def test_a_scheduler_that_fails_as_a_whole_starts_again(monkeypatch):
    keep, calls = SlotForward.keep, []

    def fails_once(self, order):
        calls.append(order)
        if len(calls) == 1:
            raise RuntimeError("no memory for the copy")
        keep(self, order)

    monkeypatch.setattr(SlotForward, "keep", fails_once)
    made = requests_and_results([{"prompt_ids": (1,), "max_new_tokens": 2}, {"prompt_ids": (2, 3)}])
    with Engine(tiny_model(), Letters()).running() as engine:
        engine.submit(*(request for request, _, _ in made))
        assert all(done.wait(30) for _, _, done in made)
        assert made[0][1][-1].finish_reason == "length"
        assert "no memory for the copy" in str(made[1][1][-1].error)
        (after,) = run(engine, [{"prompt_ids": (2, 3)}])
    assert ids_of(after) == alone(tiny_model(), (2, 3))


def test_not_a_number_in_a_row_reaches_no_other_row():
    good, model = tiny_model(), tiny_model()
    with torch.no_grad():
        model.embed.weight[[0, 28]] = torch.nan  # 0 because padding might be of that id
    prompts = [(28,) * 20, tuple(range(1, 12)), (28, 3), (1, 2, 3), (4,), (5, 6)]
    never = {0: -100.0}
    cases = [{"prompt_ids": ids, "max_new_tokens": 6, "logit_bias": never} for ids in prompts]
    made = requests_and_results(cases)
    with Engine(model, Letters(), max_batch=4, prefix_bytes=0).running() as engine:
        engine.submit(*(request for request, _, _ in made))
        assert all(done.wait(30) for _, _, done in made)
    for prompt, (_, updates, _) in zip(prompts, made, strict=True):
        assert (updates[-1].error is not None) == (28 in prompt)
        if 28 not in prompt:
            ids = list(prompt)
            for _ in range(6):
                ids.append(1 + int(good(torch.tensor([ids]))[0, -1, 1:26].argmax()))
            assert ids_of(updates) == tuple(ids[len(prompt) :])


def test_rows_that_left_leave_zeros():
    forward = SlotForward(tiny_model(), max_rows=4)
    with torch.inference_mode():
        forward.read(0, [[1, 2, 3], [4, 5, 6, 7, 8], [9]])
        forward.step([1, 2, 3])
        forward.keep([0, 2])
    for buffer in forward._buffers():
        assert buffer[1, :, :2].count_nonzero() == buffer[1, :, :2].numel()
        assert buffer[1, :, 6:].count_nonzero() == buffer[2:].count_nonzero() == 0


def test_memory_for_keys_and_values_is_kept_to():
    model = tiny_model(context_length=100_000)
    of_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, features of a head, bytes
    forward = SlotForward(model, max_rows=3, max_bytes=10 * 64 * of_token)
    assert forward.fits(2, 320)
    assert not forward.fits(2, 321)
    most = 0
    with Engine(model, Letters(), max_batch=3, prefix_bytes=0, cache_bytes=10 * 64 * of_token).running() as engine:
        engine._scheduler._forward.read, read = lambda *a: None, engine._scheduler._forward.read

        def watch(first, ids):
            nonlocal most
            states = read(first, ids)
            most = max(most, engine._scheduler._forward.num_bytes)
            return states

        engine._scheduler._forward.read = watch
        cases = [{"prompt_ids": (1,) * n, "max_new_tokens": 5} for n in (600, 10, 200, 637, 100, 300, 20)]
        results = run(engine, [dict(case) for case in cases])
    assert 0 < most <= 10 * 64 * of_token
    assert isinstance(results[3][-1].error, DoesNotFit)
    assert "--cache-memory" in str(results[3][-1].error)
    for case, updates in zip(cases, results, strict=True):
        if len(case["prompt_ids"]) != 637:
            assert ids_of(updates) == alone(model, case["prompt_ids"], 5)


def test_buffers_have_no_more_rows_than_the_batch():
    forward = SlotForward(tiny_model(), max_rows=5)
    with torch.inference_mode():
        for row in range(5):
            forward.read(row, [[1, 2]])
    assert {buffer.shape[0] for buffer in forward._buffers()} == {5}


def test_more_completions_than_ever_fit_are_refused_for_good():
    made = requests_and_results([{"prompt_ids": (1,)} for _ in range(4)])
    with (
        Engine(tiny_model(), Letters(), max_batch=2, max_waiting=1).running() as engine,
        pytest.raises(DoesNotFit, match="4 completions at once"),
    ):
        engine.submit(*(request for request, _, _ in made))


def test_a_change_that_raises_is_told_and_one_that_was_withdrawn_never_runs():
    def fails():
        raise ValueError("other shapes")

    model, ran = tiny_model(context_length=1_000_000), []
    ((long, _, _),) = requests_and_results([{"prompt_ids": (1,), "max_new_tokens": 900_000}])
    begun, withdrawn = threading.Event(), threading.Event()
    long.deliver = lambda update: begun.set()
    with Engine(model, Letters()).running() as engine:
        with pytest.raises(ValueError, match="other shapes"):
            engine.change(fails)
        engine.submit(long)
        assert begun.wait(30)
        waiting = threading.Thread(target=engine.change, args=(lambda: ran.append(1), withdrawn))
        waiting.start()
        withdrawn.set()
        engine.wake()
        waiting.join(30)
        assert not waiting.is_alive()
        assert engine.num_running == 1
    assert ran == []


def test_requests_that_meet_the_end_of_the_engine_are_answered():
    engine = Engine(tiny_model(context_length=1000), Letters(), max_waiting=100_000)
    made, refused, many = (
        requests_and_results([{"prompt_ids": (1,), "max_new_tokens": 900} for _ in range(400)]),
        [],
        threading.Event(),
    )

    def client(first):
        for index in range(first, 400, 4):
            try:
                engine.submit(made[index][0])
            except EngineStopped:
                refused.append(index)
            if index > 100:
                many.set()

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    with engine.running():
        for thread in threads:
            thread.start()
        assert many.wait(60)
    for thread in threads:
        thread.join(60)
    for index, (_, updates, done) in enumerate(made):
        if index not in refused:
            assert done.wait(60)
            assert isinstance(updates[-1].error, EngineStopped)


def held_bytes():
    """Return the memory of all tensors that are alive in this process. Bytes."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in kinds]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_500_requests_many_of_them_cancelled_leave_no_memory_behind():
    source, held = random.Random(0), []
    model = tiny_model()
    with Engine(model, Letters(), max_batch=16, max_waiting=500, prefix_bytes=20_000).running() as engine:
        for _ in range(5):
            left = threading.Semaphore(0)
            for _ in range(100):
                prompt = tuple(source.randrange(26) for _ in range(source.randint(1, 30)))
                ((request, _, _),) = requests_and_results([{"prompt_ids": prompt, "max_new_tokens": 4}])
                seen = [source.randint(1, 6)]  # some end before

                def deliver(update, request=request, seen=seen, left=left):
                    seen[0] -= 1
                    if seen[0] == 0:
                        request.is_cancelled = True
                    if seen[0] == 0 or (update.is_last and seen[0] > 0):
                        left.release()

                request.deliver = deliver
                engine.submit(request)
            for _ in range(100):
                assert left.acquire(timeout=60)
            engine.change(lambda: None)  # runs once no row is left, and drops the prefixes
            assert engine.num_running == engine._scheduler._forward.num_bytes == 0
            held.append(held_bytes())
    assert len(set(held)) == 1
