"""Texts as tokens in memory-mapped files: read once, tokenized once, then windows in an order that can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import digest, move_file
from ..training.protocol import Place
from ..training.streams import Shuffled

SPLITS = ("train", "tune", "test")
HELD_OUT = 20
"""Of so many documents (or, of a single text, of so many parts) one goes to "tune" and one to "test"."""

END = "<|end|>"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a split, memory-mapped, and the bytes of text that they stand for."""

    values: Tensor      # (n,), uint16 or int32
    bytes: int
    vocabulary: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, len(self.values))


class Windows:
    """Micro-batches of windows of ``length`` + 1 tokens, whose order is a function of (seed, epoch) alone.

    An epoch meets every window once; each rank takes its share of each batch.
    """

    def __init__(self, tokens: Tokens, length: int, batch_size: int, at: Place):
        count = (len(tokens.values) - 1) // length
        if count < batch_size * at.world:
            raise ValueError(f"the text gives {count} windows of {length} tokens, and a batch takes "
                             f"{batch_size * at.world}: take a longer text, or a smaller --context or --batch-size")
        self.tokens, self.length = tokens, length
        self.order = Shuffled((torch.arange(count),), batch_size, at)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for (starts,) in self.order:
            yield {"tokens": windows(self.tokens.values, starts * self.length, self.length)}

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)


def windows(values: Tensor, starts: Tensor, length: int) -> Tensor:
    """Rows values[start : start + length + 1] as (len(starts), length + 1) int64."""
    return torch.stack([values[int(s):int(s) + length + 1] for s in starts]).long()


def documents(source: str) -> Iterator[str]:
    """The texts of a source, in an order that does not change.

    ``source``: "stdlib" (the installed Python's own library, without tests and site-packages), a text file, a folder of
    text files, or "hf:NAME" for the column "text" of a Hugging Face data set (its "train" split; "hf:NAME/CONFIG").

    Raises:
        ValueError: nothing there, or no text in it.
    """
    if source.startswith("hf:"):
        yield from _hugging_face(source.removeprefix("hf:"))
        return
    root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else Path(source)
    if not root.exists():
        raise ValueError(f"no text at {source}: pass a file, a folder, stdlib, or hf:DATASET")
    pattern = "*.py" if source == "stdlib" else "*"
    paths = [root] if root.is_file() else sorted(p for p in root.rglob(pattern) if p.is_file())
    for path in paths:
        if source == "stdlib" and {"site-packages", "__pycache__", "test", "tests"} & set(path.relative_to(root).parts):
            continue
        try:
            yield path.read_bytes().decode()
        except UnicodeDecodeError:      # no text
            continue


def _hugging_face(name: str) -> Iterator[str]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("hf: data sets need the package datasets: pip install 'flatmin[language]'") from error
    path, _, config = name.partition(":")
    for row in datasets.load_dataset(path, config or None, split="train", streaming=True):
        yield row["text"]


def split_of(index: int) -> str:
    """Which split a document belongs to."""
    return {0: "test", 1: "tune"}.get(index % HELD_OUT, "train")


def parts(source: str) -> list[tuple[str, str]]:
    """(split, text) of every document; a single text is cut into parts at line ends."""
    found = list(documents(source))
    if not found or not any(text.strip() for text in found):
        raise ValueError(f"no text in {source}")
    if len(found) < 2 * HELD_OUT:
        lines = "".join(found).splitlines(keepends=True)
        size = -(-len(lines) // (2 * HELD_OUT))
        found = ["".join(lines[i:i + size]) for i in range(0, len(lines), size)]
    return [(split_of(i), text) for i, text in enumerate(found)]


class Bytes:
    """UTF-8 bytes as tokens, and one token for the end of a document."""

    vocabulary = 257

    def encode(self, text: str) -> list[int]:
        return [*text.encode(), 256]


class Trained:
    """A byte-level BPE tokenizer of the ``tokenizers`` package; every document ends with its ``<|end|>``."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.get_vocab_size()
        self.end = tokenizer.token_to_id(END)

    def encode(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text).ids, *([] if self.end is None else [self.end])]


def tokenizer_for(name: str, texts: Iterable[str]) -> Bytes | Trained:
    """ "bytes", "bpe-N" (trained on the texts, with N tokens), or the path of a ``tokenizer.json``."""
    if name == "bytes":
        return Bytes()
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("a BPE tokenizer needs the package tokenizers: pip install 'flatmin[language]', or pass "
                         "--tokenizer bytes") from error
    kind, _, size = name.partition("-")
    if kind == "bpe" and size.isdigit():
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator(texts, vocab_size=int(size), special_tokens=[END], show_progress=False)
        return Trained(made)
    if not Path(name).is_file():
        raise ValueError(f"no tokenizer {name!r}: pass bytes, bpe-8192, or the path of a tokenizer.json")
    return Trained(tokenizers.Tokenizer.from_file(name))


def prepared(source: str, tokenizer: str, cache: str | Path | None = None) -> Path:
    """The folder of the tokenized source: ``train.bin``, ``tune.bin``, ``test.bin``, ``meta.json``, ``tokenizer.json``.

    Made once for each source and tokenizer, under ``cache`` (default ``~/.cache/flatmin``), whole or not at all.
    """
    found = parts(source)
    key = digest(tokenizer, *(f"{split} {text}" for split, text in found))[:16]
    root = Path(cache) if cache is not None else Path.home() / ".cache" / "flatmin"
    target = root / f"text-{key}"
    if (target / "meta.json").exists():
        return target
    made = tokenizer_for(tokenizer, (text for split, text in found if split == "train"))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    dtype = torch.uint16 if made.vocabulary <= 1 << 16 else torch.int32
    meta: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "vocabulary": made.vocabulary,
                            "dtype": str(dtype).removeprefix("torch."), "splits": {}}
    for split in SPLITS:
        counts = [0, 0]
        with open(part / f"{split}.bin", "wb") as file:
            for text in (text for which, text in found if which == split):
                ids = torch.tensor(made.encode(text), dtype=torch.int32).to(dtype)
                file.write(ids.numpy().tobytes())
                counts = [counts[0] + len(ids), counts[1] + len(text.encode())]
        meta["splits"][split] = {"tokens": counts[0], "bytes": counts[1]}
    if isinstance(made, Trained):
        made.tokenizer.save(str(part / "tokenizer.json"))
    (part / "meta.json").write_text(json.dumps(meta))
    try:
        move_file(part, target)
    except OSError:     # another process was faster
        shutil.rmtree(part, ignore_errors=True)
        if not (target / "meta.json").exists():
            raise
    return target


def tokens(folder: Path, split: str) -> Tokens:
    """The tokens of a split of a prepared folder."""
    meta = json.loads((folder / "meta.json").read_text())
    size = meta["splits"][split]
    if not size["tokens"]:
        raise ValueError(f"the text {meta['source']} is too short to hold anything out: no {split} tokens")
    values = torch.from_file(str(folder / f"{split}.bin"), size=size["tokens"], dtype=getattr(torch, meta["dtype"]))
    return Tokens(values, size["bytes"], meta["vocabulary"])
