"""A tokenizer.json run by its own library, and its chat template against transformers."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from lightning_lm import protocols
from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import BPETokenizer, PretrainedTokenizer, load_tokenizer

TEXT = Path(random.__file__).read_text(encoding="utf-8")
TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('Unknown role ' + message.role) }}{% endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if tools is defined %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
MESSAGES = [{"role": "user", "content": " Hi <é> "}, {"role": "assistant", "content": "Hello"}]


def byte_level() -> dict[str, str]:
    special = ["</s>", "<|user|>", "<|assistant|>"]
    trained = BPETokenizer.train([TEXT], 500, special_tokens=special, show_progress=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    return {
        "tokenizer.json": trained.to_files()["tokenizer.json"],
        "tokenizer_config.json": json.dumps(config | {"chat_template": TEMPLATE}),
    }


def spaces_marked() -> tokenizers.Tokenizer:
    """A vocabulary in the manner of Llama 2: marks for spaces, bytes as fallback, a begin token that is added."""
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)},
        "▁": 258,
        "▁a": 259,
        "a": 260,
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.enable_truncation(5)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    for name, content in byte_level().items():
        (path / name).write_text(content, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PretrainedTokenizer:
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, PretrainedTokenizer)
    return loaded


def test_it_is_a_tokenizer(tokenizer: PretrainedTokenizer) -> None:
    assert isinstance(tokenizer, protocols.Tokenizer)
    assert tokenizer.vocab_size == 500
    assert tokenizer.special_tokens == {"</s>": 497, "<|user|>": 498, "<|assistant|>": 499}
    assert tokenizer.eos_id == 497
    assert tokenizer.unk_id is None


def test_special_tokens_are_text_unless_allowed(tokenizer: PretrainedTokenizer) -> None:
    text = "a</s> b"
    assert 497 not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 497 in tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == text


def test_ids_are_those_of_our_own_encoder(tokenizer: PretrainedTokenizer, folder: Path) -> None:
    ours = BPETokenizer.from_tokenizer_json(folder / "tokenizer.json", eos_token="</s>")
    assert tokenizer.encode(TEXT) == ours.encode(TEXT)
    np.testing.assert_array_equal(tokenizer.token_byte_lengths(), ours.token_byte_lengths())
    assert [array.tolist() for array in tokenizer.encode_batch([TEXT, ""])] == [ours.encode(TEXT), []]


@pytest.mark.parametrize("allow_special", [True, False])
def test_a_stream_has_the_ids_of_the_whole(tokenizer: PretrainedTokenizer, allow_special: bool) -> None:
    text = TEXT[:3000] + "</s>" + TEXT[:70_000]
    parts = [text[i : i + 7] for i in range(0, len(text), 7)]
    streamed = tokenizer.encode_iterable(parts, allow_special=allow_special)
    assert list(streamed) == tokenizer.encode(text, allow_special=allow_special)


def test_vocabularies_with_marks_for_spaces() -> None:
    theirs = spaces_marked()
    ours = PretrainedTokenizer(theirs.to_str(), config=json.dumps({"eos_token": None}))
    text = "a a é aaaaaaaaaaaa"
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert len(ids) == 5, "truncated"
    assert ours.encode(text)[:5] == ids
    assert ours.decode(ours.encode(text)) == text
    assert ours.token_byte_lengths()[ours.encode(text)].sum() == len(text.encode()) + 1  # the space put before
    assert ours.unk_id == 0
    assert list(ours.encode_iterable(["a ", "a é ", "aaaaaaaaaaaa"])) == ours.encode(text)


def test_saving_and_sending(tokenizer: PretrainedTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    for again in (load_tokenizer(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(again, PretrainedTokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_template_does_what_transformers_does(
    tokenizer: PretrainedTokenizer, folder: Path, prompt: bool
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "é<b>", "parameters": {}}}]
    expected = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=prompt) == expected
    ids = tokenizer.encode(tokenizer.apply_chat_template(MESSAGES), allow_special=True)
    assert ids.count(497) == 2
    assert 499 in ids


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    files = byte_level() | {"chat_template.jinja": "{{ messages | length }}"}
    assert PretrainedTokenizer.from_files(files).apply_chat_template(MESSAGES) == "2"
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    files = byte_level() | {"tokenizer_config.json": json.dumps({"chat_template": named})}
    assert PretrainedTokenizer.from_files(files).apply_chat_template(MESSAGES) == "d"


def test_a_template_may_refuse(tokenizer: PretrainedTokenizer) -> None:
    with pytest.raises(TokenizerError, match="Unknown role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": ""}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for %}",
        "{{ missing.attribute }}",
    ],
)
def test_a_hostile_or_faulty_template_does_nothing(template: str) -> None:
    files = byte_level() | {"chat_template.jinja": template}
    tokenizer = PretrainedTokenizer.from_files(files)
    with pytest.raises(TokenizerError, match="chat template cannot be applied"):
        tokenizer.apply_chat_template(MESSAGES)


def test_no_template(folder: Path) -> None:
    tokenizer = PretrainedTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer.eos_id is None or tokenizer.eos_token in tokenizer.special_tokens
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("definition", ["{", "[]", "{}", '{"model": {"type": "BPE"}}'])
def test_damaged_definitions_are_refused(definition: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        PretrainedTokenizer(definition)


def test_lone_surrogates_are_refused(tokenizer: PretrainedTokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])


def test_the_begin_of_a_text_is_the_one_that_the_files_name():
    definition = spaces_marked().to_str()
    for config, expected in (({"bos_token": "<s>"}, 1), ({"bos_token": {"content": "<s>"}}, 1), ({}, None)):
        assert PretrainedTokenizer(definition, config=json.dumps(config)).bos_id == expected
    named = PretrainedTokenizer(definition, config=json.dumps({"bos_token": None}))
    assert (named.bos_id, named.prefix_ids) == (None, [1])  # what is put before a text is another question


@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("is_special", [True, False])
def test_the_names_of_special_tokens_are_taken_from_either_file(folder: Path, tmp_path: Path, file, is_special) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in definition["added_tokens"]:
        token["special"] = is_special or token["content"] != "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (tmp_path / file).write_text(
        json.dumps({"eos_token": {"content": "</s>", "__type": "AddedToken"}, "bos_token": "<|user|>"})
    )
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert (tokenizer.eos_id, tokenizer.bos_id) == (497, 498)
        assert 497 not in tokenizer.encode("a</s> b")
        assert 497 in tokenizer.encode("a</s> b", allow_special=True)
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").eos_id == 497
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (peer.eos_token_id, peer.bos_token_id) == (497, 498)
