"""A ledger under kill -9, two writers, a full disk and a corrupt line; and tables of other people's runs."""

import json
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.scaling import RunLedger, RunRecord, curves_of, import_runs, points_of
from lightning_lm.scaling import ledger as ledger_module


def run(number, **more):
    settings = {
        "parameters": {"total": 1e6 + number},
        "flops_per_token": {"total": 6e6 + 6 * number, "products": 6e6},
        "tokens": 1000 + number,
        "loss": 4.0,
        "curve": ((500.0, 5.0), (1000.0, 4.0)),
        "hyper_parameters": {"lr": 0.1, "betas": [0.9, 0.95]},
    }
    return RunRecord(**{**settings, **more})


def test_what_is_added_is_read_back(tmp_path):
    ledger = RunLedger(tmp_path / "new" / "ledger.jsonl")
    assert ledger.read() == []
    runs = [run(0), run(1, wall_time_s=3.5, unique_tokens=7, name="b"), run(2, finished=False, source="a paper")]
    ids = [ledger.add(one) for one in runs]
    assert [record.to_dict() for record in ledger.read()] == [
        json.loads(json.dumps(one.to_dict())) | {"curve": one.curve} for one in runs
    ]
    assert [record.id for record in ledger.read()] == ids
    assert ledger.bad_lines() == []
    assert runs[0] in ledger
    assert run(9) not in ledger


def test_an_id_tells_settings_apart_and_nothing_else():
    assert run(0).id == run(0, loss=3.0, wall_time_s=9.0, versions={"torch": "3"}).id
    different = [run(0), run(0, tokens=7), run(0, name="b"), run(0, hyper_parameters={"lr": 0.2}), run(1)]
    assert len({one.id for one in different}) == 5


def test_duplicates_are_refused_and_nothing_of_their_batch_is_written(tmp_path):
    ledger = RunLedger(tmp_path / "ledger.jsonl")
    ledger.add(run(0))
    with pytest.raises(DataError, match="line 1 of"):
        ledger.add(run(0, loss=3.0))
    with pytest.raises(DataError, match="twice"):
        ledger.add_all([run(1), run(1)])
    assert len(ledger) == 1


@pytest.mark.parametrize("number", [1, 20])
def test_only_lines_with_the_id_are_parsed_when_runs_are_added(tmp_path, monkeypatch, number):
    path = tmp_path / "ledger.jsonl"
    ledger = RunLedger(path)
    mentions = run(500, hyper_parameters={"resumed_from": run(7).id})  # has another run's id in its settings
    ledger.add_all([mentions, *map(run, range(200))])
    parsed, parse = [], ledger_module._record
    monkeypatch.setattr(ledger_module, "_record", lambda line: parsed.append(line) or parse(line))
    ledger.add_all([run(1000 + index) for index in range(number)])
    assert parsed == []
    with pytest.raises(DataError, match="line 9 of"):
        ledger.add_all([run(7), *(run(2000 + index) for index in range(number - 1))])
    assert len(parsed) == 2
    monkeypatch.undo()
    assert len(ledger) == 201 + number


def test_a_run_whose_line_is_damaged_can_be_added_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    RunLedger(path).add_all([run(0), run(1)])
    path.write_text(path.read_text().replace('"tokens": 1000', '"tokens": 1008'))
    RunLedger(path).add(run(0))
    assert [bad.number for bad in RunLedger(path).bad_lines()] == [1]
    assert [record.tokens for record in RunLedger(path).read()] == [1001, 1000]


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "ledger.jsonl"
    RunLedger(path).add_all([run(0), run(1), run(2)])
    content, random = path.read_bytes(), np.random.default_rng(0)
    for place in random.choice(len(content) - 1, 64, replace=False).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        records, bad = RunLedger(path).scan()
        assert bad
        assert {record.id for record in records} < {run(number).id for number in range(3)}


def test_a_line_that_was_laid_out_anew_is_the_same_run(tmp_path):
    path = tmp_path / "ledger.jsonl"
    RunLedger(path).add(run(0))
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")) + "\n")
    assert [record.id for record in RunLedger(path).read()] == [run(0).id]
    with pytest.raises(DataError, match="line 1 of"):
        RunLedger(path).add(run(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_run_without_a_loss_is_no_run(bad):
    with pytest.raises(DataError, match="loss="):
        run(0, loss=bad)


WRITER = """
import sys
from lightning_lm.scaling import ledger as ledger_module
from lightning_lm.scaling import RunLedger, RunRecord
ledger = RunLedger(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    ledger.add(RunRecord(parameters={"total": 1.0}, flops_per_token={"total": 6.0}, tokens=1 + number, loss=4.0,
                         curve=tuple((float(i + 1), 4.0) for i in range(int(sys.argv[4])))))
    print(number, flush=True)
"""


def writer(path, first, last, curve=10):
    words = [sys.executable, "-c", WRITER, str(path), str(first), str(last), str(curve)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    processes = [writer(path, 0, 60), writer(path, 60, 120)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(record.tokens for record in RunLedger(path).read()) == list(range(1, 121))
    assert RunLedger(path).bad_lines() == []


def test_a_killed_writer_loses_at_most_the_run_it_was_writing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    process = writer(path, 0, 10_000, curve=2000)
    said = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    kept = {record.tokens - 1 for record in RunLedger(path).read()}
    assert set(said) <= kept
    RunLedger(path).add(run(5))  # the lock went with the process
    assert len(RunLedger(path)) == len(kept) + 1


@pytest.mark.parametrize("left", [1, 40, -1])
def test_half_a_line_is_named_and_the_next_run_starts_its_own(tmp_path, left):
    """The state that a kill in the middle of a write leaves: some first bytes of a line, at every kind of place."""
    path = tmp_path / "ledger.jsonl"
    ledger = RunLedger(path)
    ledger.add(run(0))
    before = path.read_bytes()
    ledger.add(run(1))
    line = path.read_bytes()[len(before) :]
    path.write_bytes(before + line[:left])
    assert [record.id for record in ledger.read()] == [run(0).id] + ([run(1).id] if left == -1 else [])
    ledger.add(run(2))
    assert [record.id for record in ledger.read()][-1] == run(2).id
    assert [bad.number for bad in ledger.bad_lines()] == ([] if left == -1 else [2])


@pytest.mark.parametrize("damage", [b"{", b"[1, 2]", b'{"hash": "0", "run": {}}', b"\xff\xfe", b'{"a": 1}'])
def test_a_corrupt_line_is_named_and_the_others_are_kept(tmp_path, damage):
    path = tmp_path / "ledger.jsonl"
    ledger = RunLedger(path)
    ledger.add_all([run(0), run(1)])
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, damage, second, b""]))
    assert [record.id for record in ledger.read()] == [run(0).id, run(1).id]
    ((number, reason),) = ledger.bad_lines()
    assert number == 2
    assert reason


def test_a_changed_number_is_noticed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    RunLedger(path).add(run(0))
    path.write_text(path.read_text().replace('"loss": 4.0', '"loss": 3.0'))
    assert RunLedger(path).read() == []
    assert "changed" in RunLedger(path).bad_lines()[0].reason


def test_a_full_disk_takes_nothing_away(tmp_path):
    """A limit on the size of files fails a write half way, as a full disk does."""
    path = tmp_path / "ledger.jsonl"
    ledger = RunLedger(path)
    ledger.add(run(0))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(DataError, match="Earlier runs are safe"):
            ledger.add(run(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    ledger.add(run(1))
    assert len(ledger) == 2


def test_a_ledger_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be opened"):
        RunLedger(tmp_path / "file" / "ledger.jsonl").add(run(0))


def test_points_and_curves_in_a_convention():
    records = [run(0), run(6, finished=False), run(12)]
    points = points_of(records, "total")
    assert points.parameters.tolist() == [1e6, 1e6 + 12]
    assert points.tokens.tolist() == [1000, 1012]
    assert points.unique_tokens is None
    assert len(points_of(records, "products", unfinished=True)) == 3
    assert points_of([run(0, unique_tokens=9)], "total").unique_tokens.tolist() == [9]
    curves = curves_of(records, "total")
    assert [curve.parameters for curve in curves] == [1e6, 1e6 + 12]
    assert np.array_equal(curves[0].tokens, [500, 1000])
    with pytest.raises(DataError, match="Known for them: products, total"):
        points_of(records, "palm")
    with pytest.raises(ConfigurationError, match="No convention"):
        points_of(records, "mine")


TABLE = [
    {"N": 1e6, "training_tokens": 2e7, "loss": 4.5, "lr": 0.1},
    {"N": 2e6, "training_tokens": 2e7, "loss": 4.25, "lr": 0.2},
]


def test_tables_of_others(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(TABLE))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in TABLE))
    (tmp_path / "a.csv").write_text("Params,compute,Loss,lr\n1e6,1.2e14,4.5,0.1\n2e6,2.4e14,4.25,0.2\n")
    table = "Params{0}compute{0}Loss{0}lr\r\n1e6{0}1.2e14{0}4.5{0}0.1\r\n2e6{0}2.4e14{0}4.25{0}0.2\r\n"
    (tmp_path / "excel.csv").write_bytes(table.format(",").encode("utf-8-sig"))
    (tmp_path / "semicolons.csv").write_bytes(table.format(";").encode("utf-8-sig"))
    for name in ("a.json", "a.jsonl", "a.csv", "excel.csv", "semicolons.csv"):
        records = import_runs(tmp_path / name)
        assert [record.parameters["total"] for record in records] == [1e6, 2e6]
        assert [record.tokens for record in records] == [20_000_000] * 2
        assert [record.flops("total") for record in records] == pytest.approx([1.2e14, 2.4e14])
        assert [float(record.hyper_parameters["lr"]) for record in records] == [0.1, 0.2]
        RunLedger(tmp_path / "ledger.jsonl").add_all(records)
    assert len(RunLedger(tmp_path / "ledger.jsonl")) == 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "N,loss\n1e6,4\n", "row 1 has columns N, loss"),
        ("a.csv", "N,D,loss\n1e6,many,4\n", "'many', which is no number"),
        ("a.csv", "N,D,loss\n1e6,1e7,-4\n", "must be positive"),
        ("a.csv", "", "holds no run"),
        ("a.json", "{}", "list of objects"),
        ("a.jsonl", "{", "cannot be read"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        import_runs(tmp_path / name)
