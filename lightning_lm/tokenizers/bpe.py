"""Byte-level byte-pair encoding: trained here, applied by tiktoken."""

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import gpt2_files, tokenizer_json
from lightning_lm.tokenizers.base import (
    END_OF_TEXT,
    ByteTableTokenizer,
    number_special,
    read_marker,
    write_files,
)
from lightning_lm.tokenizers.merges import learn_merges
from lightning_lm.tokenizers.patterns import SplitPattern
from lightning_lm.tokenizers.vocabulary import Merge, Vocabulary
from lightning_lm.tokenizers.word_counts import Text, count_words

if TYPE_CHECKING:
    import tiktoken
if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["BPETokenizer", "TrainingProgress", "training_progress"]

# tiktoken's regular expressions run out of stack on runs of some hundred thousand blanks.
_LONG_BLANK = 25_000


class BPETokenizer(ByteTableTokenizer):
    """Byte-level byte-pair encoding.

    Every text can be encoded, and decoding gives it back exactly. Ids 0-255 are the bytes, then come the merges in the
    order they were learned, then the special tokens; files of other programs may number them differently.

    Args:
        merges: Pairs of byte strings, in the order in which they are applied.
        special_tokens: Names, which are numbered after the merges, or names with their ids.
        pattern: ``"gpt2"``, ``"gpt4"``, ``"qwen2"`` or an expression: how text is split into words; merges stay
            within one.
        eos_token: The special token that ends a document.
        ids: The id of every byte and of every merged token, where they are not numbered as above.

    Raises:
        TokenizerError: If the merges contradict each other, so that ids would depend on who applies them.

    Source:
        Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019, section 2.2.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        *,
        special_tokens: Sequence[str] | Mapping[str, int] = (END_OF_TEXT,),
        pattern: SplitPattern | str = "gpt4",
        eos_token: str | None = None,
        ids: Mapping[bytes, int] | None = None,
    ) -> None:
        self.vocabulary = Vocabulary(merges, ids)
        if not isinstance(special_tokens, Mapping):
            special_tokens = number_special(special_tokens, self.vocabulary.next_id)
        super().__init__(self.vocabulary.table(special_tokens), special_tokens, eos_token)
        self.pattern = SplitPattern.of(pattern)

    @classmethod
    def train(
        cls,
        texts: Iterable[Text],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        pattern: SplitPattern | str = "gpt4",
        num_workers: int | None = None,
        show_progress: bool | None = None,
    ) -> Self:
        """Learn merges from texts; the most frequent pair first, ties to the greatest pair of byte strings.

        The vocabulary is smaller than requested if the texts have too few distinct pairs. Memory holds the
        distinct words and a few megabytes of text, so the corpus may be larger than memory.

        Args:
            texts: Documents, or paths of UTF-8 text files, which are read in blocks.
            vocab_size: Number of ids wanted: 256 bytes, merges and special tokens.
            special_tokens: They split the text, are never merged, and get the last ids.
            pattern: As in the class.
            num_workers: Processes that count words; by default one a CPU core. Small corpora need none.
            show_progress: ``None`` shows a bar where stderr is a terminal.

        Raises:
            TokenizerError: If the vocabulary is smaller than the bytes and special tokens, or a text is not Unicode.
        """
        pattern = SplitPattern.of(pattern)
        num_special = len(number_special(special_tokens, 256))
        if vocab_size < 256 + num_special:
            raise TokenizerError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {num_special} special tokens need at least "
                f"{256 + num_special}."
            )
        num_merges = vocab_size - 256 - num_special
        with training_progress(show_progress) as progress:
            counts = count_words(
                texts, pattern, special_tokens=special_tokens, num_workers=num_workers, on_progress=progress.counted
            )
            pairs = learn_merges(counts, num_merges, on_progress=progress.merging(num_merges))
        return cls(_named(pairs), special_tokens=special_tokens, pattern=pattern)

    @property
    def merges(self) -> list[Merge]:
        """The merges, in the order in which they are applied."""
        return list(self.vocabulary.merges)

    @classmethod
    def from_gpt2_files(
        cls,
        vocab: Path | str,
        merges: Path | str,
        *,
        pattern: SplitPattern | str = "gpt2",
        eos_token: str | None = None,
    ) -> Self:
        """Read ``vocab.json`` and ``merges.txt``; entries that no merge makes are special tokens."""
        parsed = gpt2_files.parse(Path(vocab).read_text(encoding="utf-8"), Path(merges).read_text(encoding="utf-8"))
        return cls(
            parsed.merges, ids=parsed.ids, special_tokens=parsed.special_tokens, pattern=pattern, eos_token=eos_token
        )

    def save_gpt2_files(self, folder: Path | str) -> None:
        """Write ``vocab.json`` and ``merges.txt``, which GPT-2's tools and Hugging Face read."""
        files = gpt2_files.render(self.vocabulary, self.special_tokens)
        write_files(Path(folder), files, known_by=tuple(files))

    @classmethod
    def from_tokenizer_json(cls, path: Path | str, *, eos_token: str | None = None) -> Self:
        """Read a Hugging Face ``tokenizer.json`` of byte-level byte-pair encoding.

        Raises:
            TokenizerError: If it is of another kind; `PretrainedTokenizer` reads those.
        """
        parsed = tokenizer_json.parse(Path(path).read_text(encoding="utf-8"))
        return cls(
            parsed.merges,
            ids=parsed.ids,
            special_tokens=parsed.special_tokens,
            pattern=parsed.pattern,
            eos_token=eos_token,
        )

    def to_files(self) -> dict[str, str]:
        """Return the files of this tokenizer; Hugging Face reads two of them."""
        return {
            "tokenizer.json": tokenizer_json.render(self.vocabulary, self.special_tokens, self.pattern),
            "tokenizer_config.json": tokenizer_json.render_config(self.eos_token),
            **self._marker(pattern=self.pattern.to_dict()),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> Self:
        """Return the tokenizer that `to_files` described."""
        settings = read_marker(files)
        if "tokenizer.json" not in files:
            raise TokenizerError("tokenizer.json is missing: these files are no complete tokenizer.")
        parsed = tokenizer_json.parse(files["tokenizer.json"])
        return cls(
            parsed.merges,
            ids=parsed.ids,
            special_tokens=parsed.special_tokens,
            pattern=SplitPattern(**settings["pattern"]),
            eos_token=settings["eos_token"],
        )

    def _extended(self, tokens: Sequence[str]) -> Self:
        special = {**self.special_tokens, **number_special(tokens, self.vocab_size)}
        return type(self)(
            self.merges,
            special_tokens=special,
            pattern=self.pattern,
            eos_token=self.eos_token,
            ids=self.vocabulary.ids,
        )

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            "bpe", pat_str=self.pattern.complete, mergeable_ranks=self.vocabulary.ranks, special_tokens={}
        )

    @functools.cached_property
    def _word_encoding(self) -> "tiktoken.Encoding":
        """The same merges, without splitting: every text is one word."""
        import tiktoken

        return tiktoken.Encoding(
            "bpe-word", pat_str=r"[\s\S]+", mergeable_ranks=self.vocabulary.ranks, special_tokens={}
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        if _has_long_blank(text):
            ranks = [rank for word in self.pattern.split(text) for rank in self._word_encoding.encode_ordinary(word)]
        else:
            ranks = self._encoding.encode_ordinary(text)
        ids = self.vocabulary.ids_of_ranks
        return ranks if ids is None else ids[np.asarray(ranks, dtype=np.int64)].tolist()

    def _last_cut(self, text: str) -> int:
        return self.pattern.last_cut(text)


def _named(pairs: Iterable[tuple[int, int]]) -> list[Merge]:
    names = [bytes([byte]) for byte in range(256)]
    merges = []
    for left, right in pairs:
        merges.append((names[left], names[right]))
        names.append(names[left] + names[right])
    return merges


def _has_long_blank(text: str) -> bool:
    """Return whether the text may have a run of twice `_LONG_BLANK` blanks, by looking at a few characters only."""
    return len(text) >= _LONG_BLANK and any(
        text[start : start + _LONG_BLANK].isspace() for start in range(0, len(text), _LONG_BLANK)
    )


class TrainingProgress:
    """Shows how many characters are counted and how many merges are made. Without a bar it does nothing."""

    def __init__(self, bar: "Progress | None" = None) -> None:
        self._bar = bar
        self._counting: TaskID | None = None
        self._characters = 0
        self._began = time.monotonic()

    def counted(self, characters: int) -> None:
        """Report that more characters of the corpus were counted."""
        if self._bar is None:
            return
        if self._counting is None:
            self._counting = self._bar.add_task("Counting words", total=None, note="")
        self._characters += characters
        megabytes, seconds = self._characters / 1e6, max(1e-9, time.monotonic() - self._began)
        note = f"{megabytes:,.1f} MB, {megabytes / seconds:.1f} MB/s"
        self._bar.update(self._counting, completed=self._characters, note=note)

    def merging(self, total: int) -> Callable[[int], None]:
        """Begin the merges; return the function that takes the number of merges made so far."""
        if self._bar is None:
            return lambda done: None  # noqa: ARG005  (the same call whether or not a bar is shown)
        if self._counting is not None:
            self._bar.update(self._counting, total=self._characters)
        bar, task = self._bar, self._bar.add_task("Learning merges", total=total, note="")
        return lambda done: bar.update(task, completed=done, note=f"{done:,} of {total:,}")


@contextmanager
def training_progress(show: bool | None) -> Iterator[TrainingProgress]:
    """Show a progress bar while the block runs.

    Args:
        show: ``None`` shows it only where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield TrainingProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield TrainingProgress(bar)
