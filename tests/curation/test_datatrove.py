"""Stages of datatrove's local executor against a run on one machine."""

import json

from datatrove.data import Document as DatatroveDocument
from datatrove.executor.local import LocalPipelineExecutor

from lightning_lm.curation import ExactDuplicates, GopherQuality, NearDuplicates, Pipeline, Removed
from lightning_lm.curation.datatrove import Steps, build_executors, curation_stages


def short(document):
    return document if len(document.text) > 60 else Removed(document, "short", len(document.text), 60)


def test_three_tasks_give_the_output_of_one_machine(tmp_path):
    (tmp_path / "in").mkdir()
    texts = [" ".join(f"w{(number * step) % 97}" for step in range(1, 15 + number % 9)) for number in range(120)]
    texts += [f"{text} more" for text in texts[:20]] + texts[:10]
    for part in range(4):
        lines = (json.dumps({"text": text}) for text in texts[part::4])
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(lines))
    pipeline = Pipeline([short, ExactDuplicates(), NearDuplicates()])
    report = pipeline.run(tmp_path / "in", tmp_path / "one", num_workers=1, shard_bytes=4000, show_progress=False)
    assert 0 < report.documents_kept < 130
    stages = curation_stages(pipeline, str(tmp_path / "in"), tmp_path / "many", shard_bytes=4000)
    build_executors(stages, LocalPipelineExecutor, tasks=3, workers=1, logging_dir=tmp_path / "logs").run()
    one, many = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.json*")} for name in ("one", "many")
    )
    assert many == one
    assert not (tmp_path / "many.partial").exists()


def test_steps_stand_in_a_pipeline_of_datatrove():
    documents = [DatatroveDocument(text=text, id=str(index)) for index, text in enumerate(["x" * 80, "y"])]
    assert [document.id for document in Steps(short).run(documents)] == ["0"]
    assert list(Steps(GopherQuality()).run(documents)) == []
