"""The verb ``chat``: a conversation by standard input, with a model here and with one behind a server."""

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from served_models import serving, tiny_model, tiny_tokenizer

from lightning_lm.cli import _Terminated, chat, main
from lightning_lm.cli.chat import Conversation
from lightning_lm.data.post_training.tokenizer_template import TokenizerTemplate
from lightning_lm.errors import RemoteError
from lightning_lm.generation import Generator, Sampling

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """Return a function that says lines to the verb and returns its output."""
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.touch()
    monkeypatch.setattr("lightning_lm.cli._load_model", lambda path: (MODEL, TOKENIZER))

    def say(text, *words, local=True):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = main(["chat", *(["--checkpoint", str(checkpoint)] if local else []), *words])
        out, err = capsys.readouterr()
        return status, out, err

    return say


def expected(*turns, count=6):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    ids = TokenizerTemplate().prompt_ids(messages, TOKENIZER)
    greedy = Sampling(temperature=0)
    return Generator(MODEL, TOKENIZER).generate([ids], sampling=greedy, max_new_tokens=count)[0].text


SETTINGS = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.mark.parametrize("local", [True, False], ids=["checkpoint", "server"])
def test_turns_follow_each_other(talk, local, tmp_path):
    first = expected("Hi\nthere")
    lines = f'Hi\\\nthere\n"""And\nnow?"""\n/save {tmp_path / "said.json"}\n/reset\nAnd\n'
    if local:
        status, out, err = talk(lines, *SETTINGS)
    else:
        with serving(MODEL, TOKENIZER) as (url, _):
            status, out, err = talk(lines, *SETTINGS, "--server", url, local=False)
    second = expected("Hi\nthere", first, "And\nnow?")
    said = tmp_path / "said.json"
    assert (status, err) == (0, "")
    assert out == f"{first}\n{second}\nWrote 4 messages to {said}.\nA new conversation.\n{expected('And')}\n"
    saved = json.loads(said.read_text())
    assert [turn["content"] for turn in saved] == ["Hi\nthere", first, "And\nnow?", second]


def test_commands(talk):
    lines = "/help\n/temperature x\n/temperature 0\n/nothing\n/retry\nHi\n/retry\n/system Be brief.\n/save\n/quit\nno\n"
    status, out, _ = talk(lines, "--max-new-tokens", "6", "--temperature", "1")
    assert status == 0
    assert "/system TEXT" in out
    assert "/temperature x is no number" in out
    assert "There is no command /nothing" in out
    assert "no message to answer again" in out
    assert out.count(expected("Hi") + "\n") == 2
    assert out.endswith("The system prompt is set.\nName a file: /save conversation.json\n")


class Interrupted:
    """A partner whose second piece never comes, because the user stops it."""

    def __init__(self, error):
        self.error, self.asked = error, []

    def reply(self, messages, temperature):
        self.asked.append(messages)
        yield "Well"
        raise self.error


def test_an_interrupt_stops_the_answer_and_sigterm_the_program(monkeypatch, capsys):
    partner = Interrupted(KeyboardInterrupt())
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    Conversation(partner, "Be brief.", 0.0).run()
    assert capsys.readouterr().out == "Well [stopped]\n" * 2
    assert [turn["content"] for turn in partner.asked[1]] == ["Be brief.", "one", "Well", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with pytest.raises(_Terminated):
        Conversation(Interrupted(_Terminated()), None, 0.0).run()


def test_a_failed_answer_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    partner = Interrupted(RemoteError("The server is away."))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    Conversation(partner, None, 0.0).run()
    assert "The server is away." in capsys.readouterr().out
    assert [turn["content"] for turn in partner.asked[1]] == ["two"]


def test_mistakes_are_said(talk):
    assert talk("", local=False)[0] == 2
    assert "either --checkpoint PATH or --server URL" in talk("", local=False)[2]
    assert "must be a number from 0 to 100" in talk("", "--temperature", "-1")[2]
    status, _, err = talk("", "--server", "http://127.0.0.1:9", local=False)
    assert status == 1
    assert "cannot be reached" in err
    with serving(MODEL, TOKENIZER, api_key="secret") as (url, _):
        assert "The API key is missing or wrong" in talk("", "--server", url, local=False)[2]


@contextlib.contextmanager
def answering(status, headers, body, seen):
    """Yield the address of a server that says the same to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_breaks_off_or_redirects_is_said_without_traceback(talk, monkeypatch):
    seen = []
    chunk = b'data: {"choices": [{"delta": {"content": "Hal"}}]}\n\n'
    chunked = b"%x\r\n%s\r\n40\r\nhalf of a chu" % (len(chunk), chunk)
    with answering(200, {"Transfer-Encoding": "chunked"}, chunked, seen) as url:
        status, out, _ = talk("Hi\n", "--server", url, "--model", "m", local=False)
        assert status == 0
        assert out.startswith("Hal")
        assert "broke off" in out
        status, _, err = talk("Hi\n", "--server", url, local=False)
        assert (status, "broke off" in err) == (1, True)
    with (
        answering(200, {}, b"{}", found := []) as elsewhere,
        answering(302, {"Location": f"{elsewhere}/v1/models"}, b"", seen) as url,
    ):
        monkeypatch.setenv("LIGHTNING_LM_API_KEY", "secret")
        assert f"sends its clients to {elsewhere}/v1/models" in talk("", "--server", url, local=False)[2]
        assert found == []
        monkeypatch.setenv("http_proxy", elsewhere)
        assert "sends its clients" in talk("", "--server", url, local=False)[2]
        assert found == []


def test_output_is_not_obeyed_by_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    chat._write("a\x1b[31mb\n")
    assert out.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb\n"
