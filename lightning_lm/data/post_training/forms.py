"""Forms of records for post-training, and their conversion to the few that the rest of the package reads.

A record is a mapping. These fields are read after conversion::

    {"messages"}                          a conversation to train on             messages
    {"prompt", "completion"}              a completion to train on               prompt_completion
    {"text"}                              a text to train on, every token        text
    {"input_ids", "labels"?}              tokens to train on                     tokens
    {"prompt"?, "chosen", "rejected"}     two completions, the first preferred   preference
    {"prompt", "completion", "label"}     a completion, good or bad (KTO)        unpaired
    {"prompt", ...}                       a prompt, with columns for rewards     prompt

Prompts and completions are texts or lists of messages. Converted to these by their content: ShareGPT
(``conversations`` of ``from`` and ``value``), Alpaca (``instruction``, ``input``, ``output``), the preference and KTO
forms of LLaMA-Factory, messages as JSON text, and a single message in place of a list. Others need `Columns`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_lm.data.post_training.messages import Instruction, Record, checked_text, messages_of
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.parts import Part

__all__ = [
    "Alpaca",
    "Columns",
    "Form",
    "Record",
    "RecordForm",
    "ShareGPT",
    "by_content",
    "form_of",
    "label_of",
    "unknown_form",
]

Form = Literal["preference", "unpaired", "prompt_completion", "messages", "tokens", "prompt", "text"]

_FIELDS: dict[Form, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "tokens": ("input_ids",),
    "prompt": ("prompt",),
    "text": ("text",),
}
_COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected", "label", "text", "input_ids")
_SOURCES = ("conversations", "instruction", "input", "output", "system", "history", "kto_tag")
"""Fields that `by_content` converts, so a named form must use them up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordForm(Part):
    """Base of the forms of records that YAML can name, for data whose content does not tell."""

    def convert(self, record: Mapping[str, Any]) -> Record:
        """Return a record with the fields that the package reads.

        Args:
            record: As it stands in the data.

        Raises:
            DataError: If the record does not have this form; names the field.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareGPT(RecordForm):
    """Conversations of ``{"from", "value"}``, with an optional ``system`` text beside them.

    Args:
        conversations: Field with the list of messages.
        role: Key of the role in a message.
        content: Key of the text in a message.
    """

    conversations: str = "conversations"
    role: str = "from"
    content: str = "value"

    def convert(self, record: Mapping[str, Any]) -> Record:
        """Return the record with ``messages``, or with the fields of a preference or KTO record."""
        return _from_conversations(record, self.conversations, (self.role, self.content))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alpaca(RecordForm):
    """Single turns of ``instruction``, ``input`` and ``output``, with optional ``system`` and ``history``.

    The prompt is the instruction, a line break, and the input if there is one; under `Plain` another line break ends
    it. For another wording, such as the preamble "Below is an instruction", use `PromptedExamples`.

    Args:
        instruction: Field with the instruction.
        input: Field with its input; may be missing or empty.
        output: Field with the completion.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"

    def convert(self, record: Mapping[str, Any]) -> Record:
        """Return the record with ``prompt`` and ``completion``, or with the fields of a preference or KTO record."""
        instruction = checked_text(_required(record, self.instruction), self.instruction)
        given = record.get(self.input)
        asked = Instruction("\n".join(filter(None, (instruction, given and checked_text(given, self.input)))))
        before = _history(record)
        prompt = [*before, {"role": "user", "content": asked}] if before else asked
        kept = _without(record, self.instruction, self.input, self.output, *_SOURCES, *_COLUMNS)
        found = _present(record, "chosen", "rejected", "label", "kto_tag")
        if "chosen" not in found or "rejected" not in found:
            found["completion"] = checked_text(_required(record, self.output), self.output)
        return by_content({**kept, "prompt": prompt, **found})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(RecordForm):
    """A mapping from the fields that the package reads to the columns of the data.

    Of these fields only the named ones are read, so it also chooses where a record has several forms. Other columns
    stay as they are, for rewards.

    Args:
        prompt: Column of the prompt, a text or a list of messages.
        completion: Column of the completion to train on.
        messages: Column of the conversation.
        chosen: Column of the preferred completion.
        rejected: Column of the other completion.
        label: Column with the label of the completion, desirable or not, for KTO.
        text: Column of a text of which every token is trained on.
        input_ids: Column of token ids.

    Raises:
        ConfigurationError: If no column is named.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    text: str | None = None
    input_ids: str | None = None

    def __post_init__(self) -> None:
        if not any(getattr(self, name) for name in _COLUMNS):
            raise ConfigurationError(
                "Columns() names no column. Name the columns of the data, for instance "
                "Columns(prompt='question', completion='answer')."
            )

    def convert(self, record: Mapping[str, Any]) -> Record:
        """Return the record with the named columns under the names that the package reads."""
        named = {name: getattr(self, name) for name in _COLUMNS if getattr(self, name)}
        renamed = {name: _required(record, column) for name, column in named.items()}
        used = {*_COLUMNS, *_SOURCES} - {"system"}  # which comes before any prompt
        kept = {name: value for name, value in record.items() if name not in used and name not in named.values()}
        return by_content({**kept, **renamed})


def by_content(record: Mapping[str, Any]) -> Record:
    """Return a record with the fields that the package reads, whatever known form it has. Unknown fields stay.

    Args:
        record: As it stands in the data; a field that is ``None`` is not there.

    Raises:
        DataError: If a known field has a value that cannot be read; names the field.
    """
    found = {name: value for name, value in record.items() if value is not None}
    is_known = any(all(name in found for name in _FIELDS[form]) for form in ("messages", "prompt_completion"))
    if "conversations" in found and not is_known:
        return _from_conversations(found, "conversations", None)
    alpaca = "instruction" in found and ("output" in found or {"chosen", "rejected"} <= found.keys())
    if alpaca and not is_known:
        if "prompt" not in found:
            return Alpaca().convert(found)
        if "output" in found and "chosen" not in found:  # the prompt was written from the other fields
            return _checked({**found, "completion": found["output"]})
    if "messages" in found:
        return _conversation(_without(found, "messages"), messages_of(found["messages"], "messages"))
    return _checked(_after_system(found))


def form_of(record: Mapping[str, Any]) -> Form:
    """Return the form of a record, judged by its fields.

    Args:
        record: A field that is ``None`` is not there.

    Raises:
        DataError: If it has none of the forms; names the fields that it has.
    """
    for form, fields in _FIELDS.items():
        has_label = form != "unpaired" or label_of(record) is not None
        if has_label and all(record.get(field) is not None for field in fields):
            return form
    raise unknown_form(record, "one of the known forms", tuple(_FIELDS))


def refuse_mixed(record: Mapping[str, Any]) -> None:
    """Refuse a record that has several forms to train on, such as ``messages`` beside ``prompt`` and ``completion``.

    Args:
        record: As it stands in the data.

    Raises:
        DataError: If it has; names the fields.
    """
    examples = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
    found = [fields for fields in examples if all(record.get(field) is not None for field in fields)]
    if len(found) > 1 and record.get("input_ids") is None:
        forms = " and ".join(" + ".join(fields) for fields in found)
        columns = {"conversations": "messages"}
        choice = " ".join(f"--data.train.format.{columns.get(field, field)} {field}" for field in found[0])
        choice = choice if found[0] != ("instruction", "output") else ""
        raise DataError(
            f"It has several forms: {forms}. Choose one: --data.train Examples --data.train.source PATH "
            f"--data.train.format Columns {choice}"
        )


def unknown_form(record: Mapping[str, Any], wanted: str, forms: Sequence[Form]) -> DataError:
    """Return the error for a record that cannot be used, with the forms that can.

    Args:
        record: As it came.
        wanted: Description of the accepted forms.
        forms: Forms that can be used.
    """
    known = "; ".join(" + ".join(_FIELDS[form]) for form in forms)
    columns = " ".join(f"--data.train.format.{field} COLUMN" for field in _FIELDS[forms[0]])
    return DataError(
        f"It has the fields {sorted(name for name, value in record.items() if value is not None)}, which is not "
        f"{wanted} ({known}; also ShareGPT's conversations and Alpaca's instruction + output). Name its columns: "
        f"--data.train Examples --data.train.source PATH --data.train.format Columns {columns}{_lists(record)}"
    )


def _lists(record: Mapping[str, Any]) -> str:
    """Return what to do with fields that are lists of objects: the conversation, or all records in one object."""
    for name, value in record.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, Mapping) and {"role", "from"} & first.keys():
            form = f"ShareGPT --data.train.format.conversations {name}"
            form = form if "from" in first else f"Columns --data.train.format.messages {name}"
            return f". {name!r} is a conversation: --data.train.format {form}"
        if isinstance(first, Mapping) and len(record) < 3:
            return f". {name!r} is a list of records; write them one a line: jq -c '.{name}[]' FILE > records.jsonl"
    return ""


def label_of(record: Mapping[str, Any]) -> bool | None:
    """Return whether a completion is good, from ``label`` or ``kto_tag``; ``None`` if the record does not tell.

    Args:
        record: A field of another type, such as a class name, is no label.
    """
    label = record.get("label") if record.get("label") is not None else record.get("kto_tag")
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):
        return label.strip().lower() == "true"
    return bool(label) if isinstance(label, int | float) and label in (0, 1) else None


def _from_conversations(record: Mapping[str, Any], field: str, keys: tuple[str, str] | None) -> Record:
    turns = messages_of(_required(record, field), field, keys)
    kept = _without(record, field, *_SOURCES, *_COLUMNS)
    return _conversation({**kept, **_present(record, "chosen", "rejected", "label", "kto_tag", "system")}, turns)


def _conversation(record: Record, turns: list[Record]) -> Record:
    """Return a record with a conversation under the field that its other fields ask for."""
    if isinstance(record.get("system"), str) and record["system"] and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": checked_text(record["system"], "system")}, *turns]
    record = _without(record, "system")
    if "chosen" in record and "rejected" in record:
        opens = bool(turns) and turns[-1]["role"] != "assistant" and record.get("prompt") is None
        return _checked({**record, "prompt": turns} if opens else record)
    if label_of(record) is not None and turns and turns[-1]["role"] == "assistant":
        return _checked({**_without(record, "prompt"), "prompt": turns[:-1], "completion": turns[-1:]})
    return _checked({**record, "messages": turns})


def _after_system(record: Record) -> Record:
    """Return a record whose prompt begins with the text of its field ``system``, if it has both."""
    system, prompt = record.get("system"), record.get("prompt")
    if not isinstance(system, str) or not system.strip() or prompt is None:
        return record
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt, "prompt")
    before = [] if turns and turns[0]["role"] == "system" else [{"role": "system", "content": system}]
    return {**_without(record, "system"), "prompt": [*before, *turns]}


def _checked(record: Record) -> Record:
    """Return a record whose prompts, completions and texts were checked; messages are lists."""
    checked = dict(record)
    for name in ("prompt", "completion", "chosen", "rejected"):
        value = record.get(name)
        if value is not None:
            checked[name] = checked_text(value, name) if isinstance(value, str) else messages_of(value, name)
    if isinstance(checked.get("prompt"), list):  # context, whatever the weights of its messages
        checked["prompt"] = [_without(message, "weight") for message in checked["prompt"]]
    if "kto_tag" in checked:
        checked["label"] = checked.pop("kto_tag")
    return checked


def _history(record: Mapping[str, Any]) -> list[Record]:
    """Return the turns before an instruction of Alpaca: the system's text, and pairs of instruction and response."""
    system, pairs = record.get("system"), record.get("history") or []
    turns: list[Record] = [{"role": "system", "content": checked_text(system, "system")}] if system else []
    for place, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history[{place}] is {str(pair)[:60]!r}; expected a pair of instruction and response.")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": checked_text(said, f"history[{place}]")})
    return turns


def _required(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise DataError(f"It has no field {name!r}, but {sorted(key for key in record if record[key] is not None)}.")
    return record[name]


def _present(record: Mapping[str, Any], *names: str) -> Record:
    return {name: record[name] for name in names if record.get(name) is not None}


def _without(record: Mapping[str, Any], *names: str) -> Record:
    return {name: value for name, value in record.items() if name not in names}
