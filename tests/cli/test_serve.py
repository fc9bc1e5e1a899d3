"""The verb ``serve`` in this process; `tests/serving` has what its server answers."""

import logging

import pytest
from served_models import tiny_model, tiny_tokenizer

from lightning_lm.cli import main


class Recorded(logging.NullHandler):
    closed = False

    def close(self):
        self.closed = True
        super().close()


@pytest.fixture
def handler():
    handler, logger = Recorded(), logging.getLogger("another package")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_log_handlers_of_other_packages_stay_open(handler, monkeypatch, capsys, tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.touch()
    monkeypatch.setattr("lightning_lm.cli._load_model", lambda path: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    assert main(["serve", "--checkpoint", str(checkpoint), "--port", "0"]) == 0
    assert "Serving" in "".join(capsys.readouterr())
    assert not handler.closed
