import os
import time

from lightning_lm.storage import locked, remove_abandoned


def test_parts_of_a_killed_run_go_after_a_day_unless_somebody_holds_them(tmp_path):
    names = ("old", "held", "new")
    for name in names:
        with locked(tmp_path / name):
            (tmp_path / name / "chunk").write_bytes(b"tokens")
        if name != "new":
            os.utime(tmp_path / name, (0, time.time() - 100_000))
    with locked(tmp_path / "held"):
        os.utime(tmp_path / "held", (0, time.time() - 100_000))
        remove_abandoned(tmp_path / name for name in (*names, "nothing"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "new"]
