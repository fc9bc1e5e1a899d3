"""A server that fails, hangs, trickles and lies, and a client that must neither hang nor believe it."""

import socket
import time

import pytest

from lightning_lm.errors import ConfigurationError, RemoteError
from lightning_lm.json_http import JSONServer
from lightning_lm.parts import Part

GOOD = {"json": {"answer": 42}}


@pytest.fixture
def client(serve):
    def make(*steps, **settings):
        scenario = serve(*steps)
        server = JSONServer(url=f"{scenario.url}/v1/", **{"backoff_s": 0.0, "timeout_s": 20.0, **settings})
        return server, scenario

    return make


@pytest.mark.parametrize("trouble", [{"status": status} for status in (429, 500, 502, 503, 504)] + [{"drop": True}])
def test_passing_trouble_is_tried_again(client, trouble):
    server, scenario = client(trouble, trouble, GOOD, retries=2)
    assert server.post("completions", {"text": "ä"}) == {"answer": 42}
    assert [(request["path"].partition("/v1")[2], request["body"]) for request in scenario.requests] == [
        ("/completions", {"text": "ä"})
    ] * 3


def test_trouble_that_stays_ends_after_the_last_retry(client):
    server, scenario = client({"status": 500, "raw": "out of\nmemory"}, retries=3)
    with pytest.raises(RemoteError, match=r"500: out of memory \(4 attempts\)") as caught:
        server.post("x", {})
    assert caught.value.status == 500
    assert len(scenario.requests) == 4


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"status": 400, "raw": "too long"}, "400: too long"),
        ({"status": 401}, "api_key_variable"),
        ({"status": 404}, "/v1"),
        ({"status": 307, "headers": {"Location": "http://elsewhere"}}, "http://elsewhere"),
        ({"raw": '{"answer": 4'}, "not JSON"),
        ({"raw": ""}, "not JSON"),
        ({"raw": "<html>"}, "<html>"),
        ({"raw": "[1]"}, "JSON object"),
        ({"raw": '{"a":' * 100_000}, "not JSON"),
    ],
)
def test_what_another_attempt_would_not_change_is_not_tried_again(client, step, message):
    server, scenario = client(step, GOOD)
    with pytest.raises(RemoteError, match=message):
        server.post("x", {})
    assert len(scenario.requests) == 1


def test_an_answer_that_ends_early_is_tried_again(client):
    server, _ = client({"raw": "{}", "headers": {"Content-Length": 10, "Connection": "close"}}, GOOD)
    assert server.post("x", {}) == {"answer": 42}


@pytest.mark.parametrize("step", [{"hang": True}, {"trickle": True}])
def test_a_server_that_hangs_or_trickles_is_left_at_the_deadline(client, step):
    server, scenario = client(step, timeout_s=1.0)
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="timeout_s=1") as caught:
        server.post("x", {})
    assert caught.value.status is None
    assert 0.9 < time.monotonic() - begin < 60  # the upper bound leaves room for a busy machine
    assert len(scenario.requests) == 1


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections
        server = JSONServer(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1, backoff_s=0.0)
        with pytest.raises(RemoteError, match=r"cannot be reached: ConnectionRefusedError.*2 attempts") as caught:
            server.post("x", {})
    assert caught.value.status is None


def test_the_pause_doubles_and_heeds_the_server_within_bounds(monkeypatch, client):
    pauses = []
    monkeypatch.setattr("lightning_lm.json_http.time.sleep", pauses.append)
    waits = [{"status": 503}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "7"}}]
    server, _ = client(*waits, {"status": 429, "headers": {"Retry-After": "99999"}}, GOOD, backoff_s=1.0)
    server.post("x", {})
    assert 0.5 <= pauses[0] <= 1
    assert 1 <= pauses[1] <= 2
    assert pauses[2:] == [7.0, 60.0]


def test_the_key_is_sent_and_never_kept(client, monkeypatch):
    server, scenario = client(GOOD, api_key_variable="JUDGE_KEY")
    with pytest.raises(ConfigurationError, match=r"JUDGE_KEY.*not set"):
        server.post("x", {})
    monkeypatch.setenv("JUDGE_KEY", "s3cret\n")
    server.post("x", {})
    assert scenario.requests[0]["headers"]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in f"{server!r}{server.to_dict()}"
    assert Part.from_dict(server.to_dict()) == server


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://key@host/", "http://h/?a", "http://h:x"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigurationError, match="url="):
        JSONServer(url=url)


@pytest.mark.parametrize("setting", [{"timeout_s": 0}, {"retries": -1}, {"backoff_s": -1.0}])
def test_numbers_out_of_range_are_refused(setting):
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        JSONServer(url="http://host", **setting)


def test_a_response_without_end_is_not_read_to_its_end(client):
    server, _ = client({"raw": '{"a": "' + "x" * 100_000 + '"}'}, max_bytes=10_000)
    with pytest.raises(RemoteError, match=r"more than max_bytes=10,000 bytes") as caught:
        server.post("x", {})
    assert caught.value.status == 200
    with pytest.raises(ConfigurationError, match="max_bytes=0"):
        JSONServer(url="http://host", max_bytes=0)
