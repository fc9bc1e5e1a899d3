"""The official client of OpenAI against the server."""

import json
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
from served_models import serving, tiny_model, tiny_tokenizer

from lightning_lm.generation import Generator, HTTPGenerator, Sampling, WeightPush
from lightning_lm.json_http import JSONServer

GREEDY = Sampling(temperature=0)
MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


@pytest.fixture(scope="module")
def address():
    with serving(MODEL, TOKENIZER, engine={"max_batch": 4, "max_waiting": 8}, max_bytes=20_000) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def alone(prompt, count, **settings):
    return Generator(MODEL, TOKENIZER).generate([prompt], max_new_tokens=count, sampling=GREEDY, **settings)[0]


def test_a_chat_is_what_the_template_writes(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say <|im_end|>."}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    start, end = TOKENIZER.special_tokens["<|im_start|>"], TOKENIZER.special_tokens["<|im_end|>"]
    written = [
        *(start, *b"system\nBe brief.", end, *b"\n"),
        *(start, *b"user\nSay <|im_end|>.", end, *b"\n"),  # a user's words are ordinary text
        *(start, *b"assistant\n"),
    ]
    assert answer.choices[0].message.content == alone(written, 12).text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(written), 12)
    assert answer.object == "chat.completion"
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=12, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == answer.choices[0].message.content
    assert len(pieces) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_log_probabilities_of_a_chat(client):
    messages = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    ids = [*choice.prompt_token_ids, *choice.token_ids]
    expected = MODEL(torch.tensor([ids])).log_softmax(-1)[0, -4:-1]
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert [entry.top_logprobs[0].token for entry in choice.logprobs.content] == list(choice.message.content)
    assert bytes(choice.logprobs.content[0].bytes).decode() == choice.message.content[0]


def test_completions_with_echo_and_log_probabilities(client):
    ids = list(b"The cat sat")
    answer = client.completions.create(
        model="tiny", prompt=[ids, "dog"], max_tokens=2, temperature=0, echo=True, logprobs=1
    )
    first, second = answer.choices
    assert (first.index, second.index) == (0, 1)
    assert first.text == "The cat sat" + alone(ids, 2).text
    assert first.logprobs.tokens == list(first.text)
    assert first.logprobs.token_logprobs[0] is None
    assert first.logprobs.top_logprobs[0] is None
    whole = [*ids, *alone(ids, 2).token_ids]
    expected = MODEL(torch.tensor([whole])).log_softmax(-1)[0]
    values = [expected[place, token].item() for place, token in enumerate(whole[1:])]
    assert first.logprobs.token_logprobs[1:] == pytest.approx(values, abs=1e-4)
    best = [max(top.values()) for top in first.logprobs.top_logprobs[1:]]
    assert best == pytest.approx(expected[:-1].amax(-1).tolist(), abs=1e-4)
    assert first.logprobs.text_offset == list(range(len(whole)))
    assert second.text.startswith("dog")
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "The cat sat"
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(values[: len(ids) - 1], abs=1e-4)


def test_seeds_several_choices_stops_and_bias(client):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 8}
    one, two = (client.completions.create(**settings, n=3, seed=5, top_p=0.9) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices]
    assert len(set(texts)) > 1
    plain = client.completions.create(**settings, temperature=0).choices[0].text
    stopped = client.completions.create(**settings, temperature=0, stop=[plain[2:4]]).choices[0]
    assert stopped.text == plain.split(plain[2:4])[0]
    assert stopped.finish_reason == "stop"
    biased = client.completions.create(**settings, temperature=0, logit_bias={"113": 100}).choices[0]
    assert biased.text == "q" * 8
    streamed = list(client.completions.create(**settings, n=2, seed=5, top_p=0.9, stream=True))
    for index in range(2):
        pieces = [chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == index]
        assert "".join(pieces) == texts[index]


def test_models_and_health(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with urllib.request.urlopen(f"{address}/health") as response:
        assert json.load(response)["status"] == "ok"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"temperature": -1}, "temperature=-1 must be a number from 0 to 100"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"max_tokens": 0}, "max_tokens=0 must be an integer of at least 1"),
        ({"max_tokens": 600}, "a context of 512 tokens; the prompt has 2 and max_tokens is 600"),
        ({"n": 1000}, "n=1000 must be an integer from 1 to 128"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [300]}, "prompt contains 300"),
        ({"prompt": [[1], []]}, r"prompt contains \[\]"),
        ({"prompt": [["a"]]}, "it must be a text, token ids from 0 to 258"),
        ({"prompt": {"a": 1}}, "prompt must be a text"),
        ({"logit_bias": {"900": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop="),
        ({"suffix": "x"}, "suffix='x' is not supported"),
        ({"logprobs": 50}, "logprobs=50 must be an integer from 0 to 20"),
        ({"extra_body": {"beams": 3}}, "The field 'beams' is not known"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "promise of JSON would not be kept"),
        ({"extra_body": {"tools": [{}]}}, "write tools into the prompt"),
    ],
)
def test_bad_fields_are_refused_by_name(client, settings, needle):
    call = {"model": "tiny", "prompt": "a", "max_tokens": 1, **settings}
    if needle is None:
        assert client.completions.create(**call).usage.prompt_tokens == 1
        return
    with pytest.raises(openai.BadRequestError, match=needle) as caught:
        client.completions.create(**call)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param is not None


@pytest.mark.parametrize(
    "messages", [[], "Hi", [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], [7]]
)
def test_bad_messages_are_refused(client, messages):
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=messages)


def post(url, data, **headers):
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_bad_bodies_paths_and_origins_get_errors_in_the_same_form(address):
    url = f"{address}/v1/completions"
    good = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert post(url, b"{")[0] == 400
    assert post(url, b"[1]")[0] == 400
    assert post(url, b"[" * 5000)[1]["error"]["code"] == "invalid_json"
    assert post(url, b" " * 20_001)[0] == 413
    assert post(url, good, **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, good, Origin="http://evil.example")[0] == 403
    assert post(url, good, Origin="http://evil.example:80", Host="evil.example:80")[0] == 403  # DNS rebinding
    assert post(url, good, Origin=address)[0] == 200
    status, body = post(f"{address}/v1/nothing", good)
    assert (status, body["error"]["type"]) == (404, "not_found_error")
    assert post(f"{address}/update_weights_from_disk", good)[0] == 404  # only where the user allows it


def test_a_model_without_chat_template_says_so():
    with (
        serving(MODEL, tiny_tokenizer(template=None), api_key="secret") as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.with_options(api_key="other").models.list()
        assert client.models.list().data[0].id == "tiny"


def wait_until(condition):
    """Wait for another thread, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_clients_that_go_leave_the_batch_and_full_queues_are_refused():
    model = tiny_model(context_length=1_000_000)
    with (
        serving(model, TOKENIZER, engine={"max_batch": 1, "max_waiting": 0}) as (url, engine),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        endless = {"model": "tiny", "prompt": "a", "max_tokens": 900_000, "temperature": 0}
        stream = client.completions.create(**endless, stream=True)
        next(iter(stream))
        assert engine.num_running == 1
        with pytest.raises(openai.RateLimitError, match="queue takes 0"):
            client.completions.create(**endless)
        stream.close()
        wait_until(lambda: engine.num_running == 0)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**endless)
        wait_until(lambda: engine.num_running == 0)
        patient = client.with_options(max_retries=9)  # on a busy machine the call that was given up may come only now
        assert patient.completions.create(**{**endless, "max_tokens": 2}).usage.completion_tokens == 2


def test_time_limit():
    with (
        serving(tiny_model(context_length=1_000_000), TOKENIZER, timeout_s=0.2) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match="time limit") as caught,
    ):
        client.completions.create(model="tiny", prompt="a", max_tokens=900_000, temperature=0)
    assert caught.value.status_code == 504


def test_our_own_backend_samples_from_it_and_pushes_weights(tmp_path):
    with serving(tiny_model(3), TOKENIZER, weights_root=tmp_path) as (url, _):
        server = JSONServer(url=url)
        folder = str(tmp_path / "policy")
        WeightPush(server=server, folder=folder)(MODEL, TOKENIZER)
        generator = HTTPGenerator(f"{url}/v1", "tiny", TOKENIZER)
        prompts = [list(b"The cat"), list(b"A dog")]
        completions = generator.generate(
            prompts, sampling=Sampling(seed=1), max_new_tokens=6, num_samples=2, logprobs=True
        )
        for completion in completions:
            ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
            scores = MODEL(ids).log_softmax(-1)[0, len(completion.prompt_ids) - 1 : -1]
            expected = scores.gather(1, ids[0, len(completion.prompt_ids) :, None])[:, 0]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        greedy = generator.generate(prompts, sampling=GREEDY, max_new_tokens=6)
        expected = Generator(MODEL, TOKENIZER).generate(prompts, sampling=GREEDY, max_new_tokens=6)
        assert [c.token_ids for c in greedy] == [c.token_ids for c in expected]
        body = json.dumps({"model_path": str(tmp_path / "none")}).encode()
        status, said = post(f"{url}/update_weights_from_disk", body)
        assert (status, said["success"]) == (400, False)
