"""Chunks worked on by several processes: in order, read no further ahead than needed, and no process left behind."""

import os
import signal

import pytest

from lightning_lm.data import Examples, Plain, SupervisedRows, store_examples
from lightning_lm.data.parallel import map_chunks
from lightning_lm.errors import DataError
from lightning_lm.tokenizers import ByteTokenizer


def numbered(first, items):
    return os.getpid(), [(first + place, item) for place, item in enumerate(items)]


def kill_one_with_700(_, items):
    if 700 in items:
        os.kill(os.getpid(), signal.SIGKILL)
    return items


class KillingTokenizer(ByteTokenizer):
    """Kills the process in which it meets a certain text."""

    def encode(self, text, **words):
        if text == "fatal":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text, **words)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 100, 101, 1000])
def test_results_come_in_the_order_of_the_items(num_workers, count):
    parts = list(map_chunks(numbered, range(count), num_workers=num_workers, chunk=100))
    assert [pair for _, part in parts for pair in part] == [(number, number) for number in range(count)]
    alone = num_workers == 1 or count <= 100  # one chunk is not worth a process
    assert all((pid == os.getpid()) == alone for pid, _ in parts)


def test_items_are_read_as_they_are_needed():
    items = iter(range(10_000))
    parts = map_chunks(numbered, items, num_workers=2, chunk=10)
    assert next(parts)[1][0] == (0, 0)
    assert next(items) <= 10 * 2 * 4
    parts.close()


def test_a_killed_process_is_reported():
    with pytest.raises(DataError, match="was killed, perhaps because memory ran out"):
        list(map_chunks(kill_one_with_700, range(1000), num_workers=2, chunk=100))


def test_a_process_killed_while_it_encodes_leaves_no_store(tmp_path):
    records = [{"prompt": "a", "completion": str(number)} for number in range(2500)]
    words = {"tokenizer": KillingTokenizer(), "template": Plain(), "rows": SupervisedRows(), "cache": tmp_path}
    fatal = [*records[:-1], {"prompt": "fatal", "completion": "b"}]
    with pytest.raises(DataError, match="was killed"):
        store_examples(Examples(source=fatal), **words, num_workers=2)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert store_examples(Examples(source=records), **words, num_workers=2).counts.kept == 2500


def test_workers_end_when_their_parent_is_killed():
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        main = os.getpid()

        def kill_main(first, items):
            os.kill(main, signal.SIGKILL)
            return items

        list(map_chunks(kill_main, range(1000), num_workers=2, chunk=10))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(writer)
    assert os.read(reader, 1) == b"", "ends when the last process that inherited the other end has ended"
    os.close(reader)
