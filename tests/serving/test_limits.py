"""Requests that no well-meaning client sends, and the names under which the page may be reached."""

import asyncio
import http.client
import json
import threading
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from served_models import serving, tiny_model, tiny_tokenizer

from lightning_lm.generation import HTTPGenerator, Sampling
from lightning_lm.json_http import JSONServer
from lightning_lm.models import export_model
from lightning_lm.serving import Engine
from lightning_lm.serving.gate import Gate
from lightning_lm.serving.server import Server

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
GOOD = {"prompt": "a", "max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def client():
    with serving(MODEL, TOKENIZER) as (url, _), httpx.Client(base_url=url, timeout=60) as made:
        yield made


def completion(client, **fields):
    return client.post("/v1/completions", json={**GOOD, **fields})


@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "top_k", "seed", "n", "max_tokens"])
@pytest.mark.parametrize("digits", [30, 400, 4200])
def test_huge_integers_are_no_failure_of_the_server(client, name, digits):
    response = client.post(
        "/v1/completions", content=f'{{"prompt": "a", "max_tokens": 1, "{name}": 1{"0" * digits}}}',
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert response.status_code == (200 if name in ("seed", "top_k") else 400)
    if response.status_code == 400:
        assert response.json()["error"]["param"] == name
        assert len(response.text) < 1000


def test_deeply_nested_values_are_shown_cut_short(client):
    for name in ("temperature", "prompt", "stop", "logit_bias", "response_format", "unknown", "stream_options"):
        other = "model" if name == "prompt" else "prompt"
        body = f'{{"{other}": "tiny", "{name}": {"[" * 900}1{"]" * 900}}}'
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, name
        assert len(response.text) < 1000


def test_too_many_prompts_are_refused_before_they_are_tokenized(monkeypatch):
    tokenizer, seen = tiny_tokenizer(), []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text, **k: (seen.append(text), encode(self, text, **k))[1]
    )
    with serving(MODEL, tokenizer) as (url, _), httpx.Client(base_url=url) as client:
        seen.clear()
        response = completion(client, prompt=["word"] * 129)
        assert (response.status_code, seen) == (400, [])
        assert "129 prompts with n=1 make more than 128" in response.json()["error"]["message"]
        assert completion(client, prompt=["word"] * 65, n=2).status_code == 400
        assert seen == []
        assert "prompt contains 300" in completion(client, prompt=[*range(200), 300]).json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat", {"reasoning_effort": "none", "modalities": ["text"], "verbosity": "medium", "tools": []}),
        ("chat", {"tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}),
        ("chat", {"echo": False, "modalities": ["text"]}),
        ("chat", {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}}),
        ("text", {"use_beam_search": False, "ignore_eos": False, "min_tokens": 0, "length_penalty": 1.0, "best_of": 1}),
        ("text", {"skip_special_tokens": True, "include_stop_str_in_output": False, "add_special_tokens": True}),
        ("text", {"guided_json": None, "repeat_penalty": 1, "typical_p": 1.0, "mirostat": 0, "cache_prompt": True}),
    ],
)  # fmt: skip
def test_fields_of_public_clients_that_ask_for_nothing_are_taken(client, path, fields):
    settings = {"max_tokens": 3, "temperature": 0}
    plain = (
        {**settings, "messages": [{"role": "user", "content": "Hi"}]} if path == "chat" else {**settings, "prompt": "a"}
    )
    where = "/v1/chat/completions" if path == "chat" else "/v1/completions"
    expected, response = (client.post(where, json=body) for body in (plain, plain | fields))
    assert response.status_code == 200, response.text
    for one in (expected, response):
        one.choice = one.json()["choices"][0]
    assert response.choice == expected.choice


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "high"}, {"modalities": ["audio"]}, {"min_tokens": 5}, {"ignore_eos": True},
        {"length_penalty": 2}, {"skip_special_tokens": False}, {"tool_choice": "required"}, {"guided_json": {"a": 1}},
        {"add_special_tokens": False},
    ],
)  # fmt: skip
def test_fields_that_ask_for_something_else_are_refused(client, fields):
    response = completion(client, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(fields))


def test_places_of_tokens_in_the_text(client):
    text = "Zoë 🙂 end"
    response = completion(client, prompt=text, echo=True, logprobs=1, max_tokens=2).json()["choices"][0]
    begins = [place for place, letter in enumerate(text) for _ in letter.encode()]  # each byte is a token
    said = response["text"][len(text) :]
    places = [0, *begins, len(text), len(text) + 1]  # the token that begins a text is none of it
    assert response["logprobs"]["text_offset"] == places
    assert len(said) == 2
    alone = completion(client, prompt=text, logprobs=1, max_tokens=2).json()["choices"][0]
    assert alone["logprobs"]["text_offset"] == [0, 1]
    empty = completion(client, prompt="", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert empty["logprobs"]["text_offset"] == [0, 0]
    lines = completion(client, prompt=text, echo=True, logprobs=1, max_tokens=2, stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [place for chunk in chunks for place in chunk["logprobs"]["text_offset"]] == places


def test_a_model_without_context_length_has_a_limit_all_the_same():
    class OnlyLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODEL

        def forward(self, input_ids):
            return self.inner(input_ids)

    with serving(OnlyLogits(), TOKENIZER) as (url, _), httpx.Client(base_url=url) as client:
        response = completion(client, max_tokens=10**12)
        assert response.status_code == 400
        assert "states no context length" in response.json()["error"]["message"]
        assert completion(client).status_code == 200


def refusal(origin, host, *, server=("127.0.0.1", 8000), allowed=()):
    """Return whether a page of this origin is refused."""
    headers = [(b"host", host.encode()), *([(b"origin", origin.encode())] if origin else [])]
    statuses = []

    async def app(scope, receive, send):
        statuses.append(200)

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "path": "/v1/models", "headers": headers, "server": server}
    asyncio.run(Gate(app, None, allowed)(scope, None, send))
    return statuses == [403]


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "127.0.0.2:8000", "0.0.0.0:8000", "[::1]:8000", "localhost:8000"])
def test_pages_at_addresses_of_this_machine_are_taken(host):
    assert not refusal(f"http://{host}", host)
    assert not refusal(f"http://{host}", host, server=("::1", 8000))
    assert refusal(f"http://{host}", "127.0.0.1:9000")


def test_names_have_to_be_known_at_a_local_address():
    assert refusal("http://evil.example:8000", "evil.example:8000")
    assert not refusal("http://chat.example", "chat.example", allowed=["Chat.example"])
    assert not refusal("https://chat.example", "127.0.0.1:8000", allowed=["chat.example"])  # the proxy's own Host
    assert refusal("https://evil.example", "127.0.0.1:8000", allowed=["chat.example"])
    assert refusal("http://evil.example", "chat.example", allowed=["chat.example"])
    assert not refusal("http://box:8000", "box:8000", server=("192.168.1.5", 8000))
    assert refusal("http://203.0.113.5", "127.0.0.1:8000")
    assert not refusal(None, "evil.example")


@pytest.mark.parametrize("origin", ["null", "", "http://", "http://[::1", "file://", "http://127.0.0.1:port"])
def test_origins_that_are_none_are_refused(origin):
    assert refusal(origin or "null", "[::1")


def test_time_limit_holds_while_the_engine_is_busy_and_while_a_body_comes():
    begun, go_on = threading.Event(), threading.Event()
    model = tiny_model()
    hidden = model.hidden

    def slow(ids, **settings):
        if ids.shape[1] == 7:
            begun.set()
            go_on.wait(60)
        return hidden(ids, **settings)

    model.hidden = slow
    with serving(model, TOKENIZER, timeout_s=0.3) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for stream in (False, True):
            response = completion(client, prompt=[5] * 7, stream=stream)
            assert response.status_code == 504
            assert begun.wait(60)
        go_on.set()
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")  # the rest never comes
        assert connection.getresponse().status == 504
        connection.close()


def test_weights_come_from_the_given_folder_one_after_the_other_and_not_for_a_client_that_went(tmp_path, monkeypatch):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "policy", outside):
        folder.parent.mkdir(exist_ok=True)
        export_model(tiny_model(1), folder, TOKENIZER)
    (root / "link").symlink_to(outside)
    loading, go_on, loads = threading.Event(), threading.Event(), []
    model = tiny_model()

    from lightning_lm.serving import weights

    load = weights.load_huggingface

    def slow(folder):
        loads.append(folder)
        loading.set()
        go_on.wait(60)
        return load(folder)

    monkeypatch.setattr(weights, "load_huggingface", slow)
    with (
        serving(model, TOKENIZER, weights_root=root) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        path = "/update_weights_from_disk"
        for folder in (outside, root / "link", root / ".." / "outside", "/etc", "\0"):
            assert client.post(path, json={"model_path": str(folder)}).status_code in (400, 403)
        assert loads == []
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json={"model_path": str(root / "policy")}, timeout=0.3)
        assert loading.wait(60)
        second = threading.Thread(
            target=client.post, args=(path,), kwargs={"json": {"model_path": str(root / "policy")}}
        )
        second.start()
        before = model.head.weight.clone()
        assert len(loads) == 1
        go_on.set()
        second.join(60)
        assert len(loads) == 2
        assert not torch.equal(model.head.weight, before)
        assert torch.equal(model.head.weight, tiny_model(1).head.weight)


def test_our_own_client_waits_while_the_queue_is_full():
    with serving(MODEL, TOKENIZER, engine={"max_batch": 2, "max_waiting": 6}) as (url, _):
        generator = HTTPGenerator(JSONServer(f"{url}/v1", retries=0, backoff_s=0.01), "tiny", TOKENIZER)
        completions = generator.generate([[5, 6]] * 6, sampling=Sampling(seed=1), max_new_tokens=4, num_samples=4)
    assert len(completions) == 24


def test_one_request_that_never_fits_is_refused_at_once(client):
    with (
        serving(MODEL, TOKENIZER, engine={"max_batch": 2, "max_waiting": 2}) as (url, _),
        httpx.Client(base_url=url) as one,
    ):
        response = completion(one, n=5)
    assert response.status_code == 400
    assert "5 completions at once" in response.json()["error"]["message"]


def test_failures_that_nobody_thought_of_have_the_form_of_errors():
    class Broken(type(TOKENIZER)):
        def decode(self, ids):
            raise KeyError("no such id")

    tokenizer = Broken(("<|endoftext|>",), eos_token="<|endoftext|>")
    with Engine(MODEL, tokenizer).running() as engine:
        transport = httpx.ASGITransport(app=Server(engine, "tiny").app, raise_app_exceptions=False)

        async def ask():
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as made:
                return await made.post("/v1/completions", json={**GOOD, "prompt": [5, 6]})

        response = asyncio.run(ask())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
