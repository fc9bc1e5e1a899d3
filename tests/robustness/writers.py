"""Everything that this package writes and reads again, with two versions of its content."""

import copy
import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from robustness.faults import Writer
from torch import distributed, nn

from lightning_lm.cli.road.record import RoadRecord, StageRecord
from lightning_lm.curation import Document, Pipeline, Report
from lightning_lm.data import Files, TokenStore, tokenize
from lightning_lm.data.post_training.chat import Plain
from lightning_lm.data.post_training.examples import Examples
from lightning_lm.data.post_training.supervised import SupervisedRows, SupervisedStore, store_examples
from lightning_lm.kernels.runtime.launch_settings import Entry, read_table, write_table
from lightning_lm.models import (
    GLU,
    Adapters,
    Attention,
    Layer,
    TransformerConfig,
    load_huggingface,
    merge_adapters,
    save_adapters,
)
from lightning_lm.models.gguf.file import DIGEST_KEY, GGUFFile
from lightning_lm.models.gguf.folder import export_gguf
from lightning_lm.models.huggingface.folder import save_huggingface
from lightning_lm.modules import load_model
from lightning_lm.modules.preference import precomputed_reference
from lightning_lm.scaling import RunLedger, RunRecord
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.sharded import write_sharded
from lightning_lm.tokenizers import ByteTokenizer, load_tokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer

torch.set_num_threads(1)
TEXT = "the cat sat on the mat and the dog sat on the log " * 4
MODELS = {
    version: TransformerConfig(
        vocab_size=300, d_model=16 * version, num_layers=2, layers=Layer(mixer=Attention(num_heads=2), ffn=GLU())
    ).build()
    for version in (1, 2)
}
TOKENIZERS = {1: BPETokenizer.train([TEXT], 262, num_workers=1), 2: BPETokenizer.train([TEXT], 270, num_workers=1)}
TABLES = {version: torch.arange(400.0).view(-1, 2) * version for version in (1, 2)}
BYTES = ByteTokenizer()


def version_of(matches: dict[int, bool]) -> int:
    (version,) = [version for version, found in matches.items() if found]
    return version


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and torch.equal(first[key], second[key]) for key in first
    )


def write_checkpoint(folder: Path, version: int) -> None:
    content = {"state_dict": MODELS[version].state_dict(), "epoch": version}
    AtomicCheckpointIO().save_checkpoint(content, folder / "last.ckpt")


def read_checkpoint(folder: Path) -> int:
    path = folder / "last.ckpt"
    if not path.exists():  # a folder that is replaced is found under another name for a moment
        path = folder / "last.replaced.ckpt"
    content = AtomicCheckpointIO().load_checkpoint(path)
    states = {version: same(content["state_dict"], model.state_dict()) for version, model in MODELS.items()}
    assert content["epoch"] == version_of(states)
    return version_of(states)


def read_export(folder: Path) -> int:
    model, tokenizer = load_huggingface(folder / "model"), load_tokenizer(folder / "model")
    version = version_of({number: same(model.state_dict(), other.state_dict()) for number, other in MODELS.items()})
    assert tokenizer.fingerprint == TOKENIZERS[version].fingerprint
    return version


def with_adapters(version: int) -> nn.Module:
    model = MODELS[1].config.build()
    model.load_state_dict(MODELS[1].state_dict())
    Adapters(rank=version).attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(version / 8)
    return model


def read_adapters(folder: Path) -> int:
    """Compare the model that the adapters have been merged into."""
    if not (folder / "base").is_dir():
        save_huggingface(MODELS[1], folder / "base")
    try:
        merged = load_model(folder / "adapters", base=folder / "base")[0].state_dict()
    finally:
        shutil.rmtree(folder / "base")
    whole = {version: merge_adapters(copy.deepcopy(model)).state_dict() for version, model in ADAPTED.items()}
    return version_of({version: same(merged, own) for version, own in whole.items()})


def write_sharded_folder(folder: Path, version: int) -> None:
    """Write as the only rank of a group."""
    folder.mkdir(parents=True, exist_ok=True)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        write_sharded({"state_dict": MODELS[version].state_dict(), "epoch": version}, folder / "last.ckpt")
    finally:
        distributed.destroy_process_group()


def read_tokenizer(folder: Path) -> int:
    found = load_tokenizer(folder / "tokenizer").fingerprint
    return version_of({version: found == tokenizer.fingerprint for version, tokenizer in TOKENIZERS.items()})


def text_of(version: int) -> list[str]:
    return [TEXT * version, "short", TEXT[:50] * version]


def write_store(folder: Path, version: int) -> None:
    tokenize(text_of(version), BYTES, folder / "store", num_workers=1, show_progress=False, overwrite=True)


def read_store(folder: Path) -> int:
    store = TokenStore(folder / "store")
    documents = [[*text.encode(), BYTES.eos_id] for version in (1, 2) for text in text_of(version)]
    assert (store.eos_id, store.vocab_size) == (BYTES.eos_id, BYTES.vocab_size)
    found = [store[index].tolist() for index in range(len(store))]
    return version_of({1: found == documents[:3], 2: found == documents[3:]})


def write_examples(folder: Path, version: int) -> None:
    """Versions are two entries of the cache."""
    for number in range(1, version + 1):
        examples_of(folder, number)


def examples_of(folder: Path, version: int) -> SupervisedStore:
    records = [{"prompt": TEXT[: 10 * version], "completion": TEXT[:30]}, {"prompt": "a", "completion": "b"}]
    rows = SupervisedRows(context_length=90)
    return store_examples(Examples(source=records), BYTES, Plain(), rows, folder / "examples", num_workers=1)


def read_examples(folder: Path) -> int:
    """Return the number of entries, each of which must be what its records give."""
    stores = [SupervisedStore(path) for path in (folder / "examples").iterdir() if path.is_dir() and not path.suffix]
    for store in stores:
        prompt = TEXT[: int(np.flatnonzero(store.learned)[0]) - 1]
        assert store[0].tolist() == [BYTES.eos_id, *prompt.encode(), *TEXT[:30].encode(), BYTES.eos_id]
        assert len(prompt) in (10, 20)
        assert store.learned.sum() == 31 + 2
    return len(stores)


def read_scores(folder: Path) -> int:
    table = precomputed_reference._read(folder / "reference.pt", TABLES[1].shape)
    return 0 if table is None else version_of({version: torch.equal(table, own) for version, own in TABLES.items()})


def run_of(index: int) -> RunRecord:
    return RunRecord(
        parameters={"total": 1e6}, flops_per_token={"total": 6e6}, tokens=10**6, loss=4.0 + index, name=str(index)
    )


def write_ledger(folder: Path, version: int) -> None:
    ledger = RunLedger(folder / "ledger.jsonl")
    for index in range(1, version + 1):
        if run_of(index) not in ledger:
            ledger.add(run_of(index))


def read_ledger(folder: Path) -> int:
    """Runs are lines of their own: a damaged one is missing, the others stay."""
    runs = RunLedger(folder / "ledger.jsonl").read()
    assert all(run.id in {run_of(1).id, run_of(2).id} for run in runs)
    assert all(
        dataclasses.replace(run, name="") in [dataclasses.replace(run_of(i), name="") for i in (1, 2)] for run in runs
    )
    return len(runs)


def entries_of(version: int) -> list[Entry]:
    sizes = {"operation": "rms_norm", "dtype": "bfloat16", "triton": "3.6", "torch": "2.13", "date": "2026-01-01"}
    times = {"before_us": 20.0, "after_us": 10.0}
    return [Entry(device="GPU", dims=(64 * version,), settings={"num_warps": 4}, **sizes, **times)]


def read_entries(folder: Path) -> int:
    found = read_table(folder / "table.json")
    return version_of({version: found == entries_of(version) for version in (1, 2)})


def write_gguf(folder: Path, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    export_gguf(INPUTS / f"model-{version}", folder / "model.gguf", quantization="f32")


def content_of(path: Path) -> dict[str, object]:
    file = GGUFFile(path)
    tensors = {name: file.read(name).tolist() for name in file.shapes}
    return {**file.metadata, **tensors, DIGEST_KEY: None}


def read_gguf(folder: Path) -> int:
    found = content_of(folder / "model.gguf")
    return version_of({version: found == content for version, content in GGUF.items()})


def shout(document: Document) -> Document:
    return Document(document.id, document.text.upper(), document.url, document.metadata)


def write_curated(folder: Path, version: int) -> None:
    source, output = Files(path=INPUTS / f"texts-{version}"), folder / "clean"
    Pipeline([shout]).run(source, output, num_workers=1, show_progress=False, overwrite=True)


def read_curated(folder: Path) -> int:
    found = sorted(Files(path=folder / "clean").documents())
    assert Report.read(folder / "clean").documents_kept == len(found)
    return version_of({version: found == sorted(text.upper() for text in text_of(version)) for version in (1, 2)})


def write_record(folder: Path, version: int) -> None:
    record = RoadRecord(folder)
    record.stages = stages_of(version)
    record.save()


def stages_of(version: int) -> dict[str, StageRecord]:
    return {f"stage {number}": StageRecord(digest=f"{number}") for number in range(version)}


def read_record(folder: Path) -> int:
    stages = RoadRecord(folder).stages
    return version_of({version: stages == stages_of(version) for version in (1, 2)}) if stages else 0


def make_inputs() -> Path:
    """Return a folder of what is exported and curated."""
    folder = Path(tempfile.mkdtemp(prefix="writers-"))
    for version in (1, 2):
        save_huggingface(MODELS[version], folder / f"model-{version}", TOKENIZERS[version])
        (folder / f"texts-{version}").mkdir()
        for number, text in enumerate(text_of(version)):
            (folder / f"texts-{version}" / f"{number}.txt").write_text(text)
    return folder


def gguf_of(version: int) -> dict[str, object]:
    export_gguf(INPUTS / f"model-{version}", INPUTS / f"{version}.gguf", quantization="f32")
    return content_of(INPUTS / f"{version}.gguf")


ADAPTED = {version: with_adapters(version) for version in (1, 2)}
INPUTS = make_inputs()
GGUF = {version: gguf_of(version) for version in (1, 2)}
WRITERS = [
    Writer("checkpoint", write_checkpoint, read_checkpoint),
    Writer(
        "export, one file",
        lambda folder, version: save_huggingface(MODELS[version], folder / "model", TOKENIZERS[version]),
        read_export,
    ),
    Writer(
        "export, shards",
        lambda folder, version: save_huggingface(
            MODELS[version], folder / "model", TOKENIZERS[version], max_shard_bytes=8_000
        ),
        read_export,
    ),
    Writer("folder of a sharded run", write_sharded_folder, read_checkpoint),
    Writer("adapters", lambda folder, version: save_adapters(ADAPTED[version], folder / "adapters"), read_adapters),
    Writer("tokenizer", lambda folder, version: TOKENIZERS[version].save(folder / "tokenizer"), read_tokenizer),
    Writer("token store", write_store, read_store),
    Writer("encoded examples", write_examples, read_examples),
    Writer(
        "reference log-probabilities",
        lambda folder, version: precomputed_reference._write(folder / "reference.pt", TABLES[version]),
        read_scores,
    ),
    Writer("ledger of runs", write_ledger, read_ledger),
    Writer("GGUF file", write_gguf, read_gguf),
    Writer("curated corpus", write_curated, read_curated),
    Writer("record of a road", write_record, read_record),
    Writer(
        "kernel settings", lambda folder, version: write_table(folder / "table.json", entries_of(version)), read_entries
    ),
]
