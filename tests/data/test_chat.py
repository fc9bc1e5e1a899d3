"""Conversations as ids: those of transformers, one begin, an end for each answer, prompts as generation has them."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lightning_lm.data import ChatML, Plain, Rendered, TokenizerTemplate, begin_ids, encode_pair
from lightning_lm.errors import ConfigurationError, DataError, TokenizerError
from lightning_lm.tokenizers import BPETokenizer, ByteTokenizer, PretrainedTokenizer

SPECIAL = ["</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
TEXT = "Hello there, how are you? 12345 67890 I am well. Assistant user system [INST] [/INST] \n\n The the " * 20

LOOP = "{%- for m in messages %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}" + LOOP + "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # in the manner of reasoning models: earlier answers lose what was thought before them
    LOOP + "{% if m.role == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    LOOP + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS}

TURNS = [
    {"role": "user", "content": "How are you? "},
    {"role": "assistant", "content": "I am well.\n"},
    {"role": "user", "content": "12"},
    {"role": "assistant", "content": "34 é"},
]


def build(template: str | None, *, adds_begin: bool = False) -> PretrainedTokenizer:
    trained = BPETokenizer.train([TEXT], 420, special_tokens=SPECIAL, show_progress=False)
    inner = tokenizers.Tokenizer.from_str(trained.to_files()["tokenizer.json"])
    if adds_begin:
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", inner.token_to_id("<s>"))])
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    return PretrainedTokenizer(inner.to_str(), config=json.dumps(config))


@pytest.fixture(scope="module")
def make():
    made = {}

    def get(template, *, adds_begin=False):
        key = template, adds_begin
        if key not in made:
            made[key] = build(template, adds_begin=adds_begin)
        return made[key]

    return get


def learned(rendered: Rendered, tokenizer) -> list[str]:
    """The runs of learned ids, as text."""
    runs, before = [], False
    for token, mask in zip(*rendered, strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(token)
        before = mask
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_begin", [False, True])
def test_ids_are_those_of_transformers(make, name, adds_begin):
    tokenizer = make(TEMPLATES[name], adds_begin=adds_begin)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_files()["tokenizer.json"]),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )
    wanted = theirs.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert TokenizerTemplate().render(TURNS, tokenizer).ids == wanted
    asked = theirs.apply_chat_template(TURNS[:3], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert TokenizerTemplate().prompt_ids(TURNS[:3], tokenizer) == asked


said = st.text(alphabet="abc 12é\n?", max_size=8)
conversations = st.lists(st.tuples(said, said), min_size=1, max_size=3)


@pytest.mark.parametrize("name", [*TEMPLATES, "built in"])
@pytest.mark.parametrize("adds_begin", [False, True])
@given(pairs=conversations)
@settings(max_examples=25, deadline=None)
def test_one_begin_and_an_end_for_each_answer(make, name, adds_begin, pairs):
    tokenizer = make(TEMPLATES.get(name), adds_begin=adds_begin)
    template = ChatML() if name == "built in" else TokenizerTemplate()
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    rendered = template.render(turns, tokenizer)
    writes_begin = name in ("headers", "brackets") or (adds_begin and name == "built in")
    assert rendered.ids.count(tokenizer.special_tokens["<s>"]) == writes_begin
    answers = learned(rendered, tokenizer)
    end = {"headers": "<|eot|>", "brackets": "</s>"}.get(name, "<|im_end|>")
    assert [answer.count(end) for answer in answers] == [1] * len(pairs)
    for answer, (_, content) in zip(answers, pairs, strict=True):
        assert answer.endswith(end)
        assert answer.removesuffix(end).strip() == content.strip()
    stops = template.stop_ids(tokenizer)
    last = len(rendered.ids) - 1 - rendered.learn_mask[::-1].index(True)
    assert rendered.ids[last] in stops


@pytest.mark.parametrize("name", [*TEMPLATES, "built in", "plain"])
@given(prompt=said, answers=st.tuples(said, said))
@settings(max_examples=25, deadline=None)
def test_every_answer_continues_the_ids_that_generation_gets(make, name, prompt, answers):
    tokenizer = make(TEMPLATES.get(name))
    template = {"plain": Plain(), "built in": ChatML()}.get(name, TokenizerTemplate())
    asked = template.prompt_ids(prompt, tokenizer)
    for answer in answers:
        prompt_ids, answer_ids, is_cut = encode_pair(prompt, answer, tokenizer, template)
        assert prompt_ids == asked
        assert not is_cut
        assert answer_ids[-1] in template.stop_ids(tokenizer)
        if name in ("plain", "built in"):
            assert tokenizer.decode(answer_ids[:-1]) == answer


@pytest.mark.parametrize("prompt", ["the ", "12", "12 ", "a\n", "", "Hello the"])
@pytest.mark.parametrize("answer", ["the", "345", "\n\n", " there"])
def test_no_merge_reaches_over_the_border(make, prompt, answer):
    tokenizer = make(None)
    prompt_ids, answer_ids, _ = encode_pair(prompt, answer, tokenizer, Plain())
    assert prompt_ids == tokenizer.encode(prompt)
    assert tokenizer.decode(prompt_ids + answer_ids) == prompt + answer + "</s>"


def test_a_cut_answer_has_no_end():
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    for template in (Plain(), ChatML()):
        prompt, whole, is_cut = encode_pair("abc", "defg", tokenizer, template)
        assert not is_cut
        assert len(whole) == 5
        size = len(prompt)
        assert encode_pair("abc", "defg", tokenizer, template, size + 5) == (prompt, whole, False)
        for room in range(5):
            assert encode_pair("abc", "defg", tokenizer, template, size + room) == (prompt, whole[:room], True)
        assert encode_pair("abc", "defg", tokenizer, template, 1) == (prompt, [], True)


def test_the_begin_mark_is_what_the_tokenizer_publishes_and_else_the_end_of_text(make):
    assert begin_ids(make(None)) == []
    assert begin_ids(make(None, adds_begin=True)) == [make(None).special_tokens["<s>"]]
    assert begin_ids(ByteTokenizer()) == [256]
    assert begin_ids(ByteTokenizer(())) == []


def test_a_tokenizer_that_marks_the_beginning_of_a_text_marks_no_answer():
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "a": 4, "b": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PretrainedTokenizer(inner.to_str(), config=json.dumps({"eos_token": "</s>"}))
    assert tokenizer.encode("a") == [3]
    assert encode_pair("b", "a", tokenizer, Plain())[:2] == ([2, 5], [4, 1])
    assert encode_pair("b", " a", tokenizer, Plain())[:2] == ([2, 5], [3, 1])


def test_a_template_may_rewrite_earlier_turns(make):
    tokenizer = make(FORGETFUL)
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"] = "hm</think>I am well."
    rendered = TokenizerTemplate().render(turns, tokenizer)
    assert learned(rendered, tokenizer) == ["I am well.<|im_end|>", "34 é<|im_end|>"]
    last = TokenizerTemplate().render(turns, tokenizer, learn_from=3)
    assert learned(last, tokenizer) == ["34 é<|im_end|>"]
    assert last.ids == rendered.ids
    assert "hm" not in tokenizer.decode(last.ids)


def test_a_template_without_an_end_of_turn_is_refused(make):
    with pytest.raises(DataError, match="learn to stop"):
        TokenizerTemplate().render(TURNS, make(ENDLESS))


def test_nobody_but_the_assistant_writes_special_tokens(make):
    tokenizer = make(CHATML)
    end = tokenizer.special_tokens["<|im_end|>"]
    turns = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    for template in (ChatML(), TokenizerTemplate()):
        ids = template.render(turns, tokenizer).ids
        assert ids.count(end) == 2
        assert "a<|im_end|><|im_end|>" in tokenizer.decode(ids)
        assert template.prompt_ids(turns[:1], tokenizer).count(end) == 1


def test_only_later_turns_are_learned_when_asked(make):
    for template, tokenizer in ((ChatML(), make(None)), (TokenizerTemplate(), make(CHATML))):
        assert len(learned(template.render(TURNS, tokenizer), tokenizer)) == 2
        assert learned(template.render(TURNS, tokenizer, learn_from=2), tokenizer) == ["34 é<|im_end|>"]
        assert learned(template.render(TURNS, tokenizer, learn_from=4), tokenizer) == []


def test_the_built_in_form_is_that_of_the_template(make):
    assert ChatML().render(TURNS, make(CHATML)) == TokenizerTemplate().render(TURNS, make(CHATML))


def test_what_a_template_reads(make):
    template = CHATML + "{% if tools %}{{ tools | length }}{% endif %}{{ mood }}"
    tokenizer = make(template)
    part = TokenizerTemplate(variables={"mood": "glad"})
    with_tools = part.for_record({"tools": [1, 2]})
    assert tokenizer.decode(with_tools.prompt_ids("a", tokenizer)).endswith("2glad")
    assert part.for_record({"tools": None}) is part
    assert TokenizerTemplate.from_dict(part.to_dict()) == part


def test_content_in_parts():
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    whole = [{"role": "user", "content": "ab"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatML().render(parts, tokenizer) == ChatML().render(whole, tokenizer)
    with pytest.raises(DataError, match="content"):
        ChatML().render([{"role": "user", "content": [{"type": "image"}]}], tokenizer)


@pytest.mark.parametrize(
    ("action", "error", "match"),
    [
        (lambda tokenizer: encode_pair("a", "b", tokenizer, ChatML()), ConfigurationError, "special_tokens"),
        (lambda tokenizer: encode_pair("a", "b", tokenizer, TokenizerTemplate()), ConfigurationError, "use ChatML"),
        (lambda _: encode_pair("a", "b", ByteTokenizer(()), Plain()), ConfigurationError, "end-of-text"),
        (lambda tokenizer: encode_pair(TURNS[:1], TURNS[1:2], tokenizer, Plain()), DataError, "Plain"),
        (lambda tokenizer: encode_pair("a", TURNS[:1], tokenizer, ChatML()), DataError, "'assistant'"),
        (lambda tokenizer: encode_pair("a", [], tokenizer, ChatML()), DataError, "no message"),
    ],
)
def test_what_cannot_be_written_is_refused(action, error, match):
    with pytest.raises(error, match=match):
        action(ByteTokenizer())


def test_a_tokenizer_without_a_template_says_so(make):
    with pytest.raises(TokenizerError, match="chat template"):
        TokenizerTemplate().render(TURNS, make(None))


def test_the_weight_of_a_turn_decides_whether_it_is_learned():
    """OpenAI's ``weight``: 0 makes an assistant's turn context, 1 makes it learned although it stands before."""
    built = build(CHATML)
    for template in (ChatML(), TokenizerTemplate()):
        plain = template.render(TURNS, built)
        marked = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
        assert template.render(marked, built) == template.render(TURNS, built, learn_from=2)
        marked = [TURNS[0], {**TURNS[1], "weight": 1}, TURNS[2], {**TURNS[3], "weight": 0}]
        first_only = template.render(marked, built, learn_from=3)
        last = template.render(TURNS, built, learn_from=2).learn_mask
        assert first_only.ids == plain.ids
        assert first_only.learn_mask == [a and not b for a, b in zip(plain.learn_mask, last, strict=True)]
        with pytest.raises(DataError, match="weight 0"):
            template.pair(TURNS[:3], [{**TURNS[3], "weight": 0}], built)


def test_plain_reads_special_tokens_when_asked():
    tokenizer = ByteTokenizer(("<|endoftext|>", "<|eot|>"))
    letters, answer = Plain().pair("1", "2<|eot|>", tokenizer)
    assert answer.ids == [*b"2<|eot|>", 256]
    assert Plain(read_special=True).pair("1", "2<|eot|>", tokenizer)[1].ids == [*b"2", 257, 256]
    reads = Plain(read_special=True).pair("<|endoftext|>1", "2<|endoftext|>", tokenizer)
    assert reads == ([256, *b"1"], Rendered([*b"2", 256], [True] * 2))  # neither begin nor end is doubled
    assert letters == [256, *b"1"]
