"""Tokenizers of transformers. One that an earlier process has kept runs without transformers, whose import takes a second."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpuvid.files.digests import file_sha256
from tpuvid.files.kept import Entry, Kept

BASES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""The base class's names in transformers 5 and 4."""
OWN = ("__call__", "_encode_plus", "_batch_encode_plus", "set_truncation_and_padding", "prepare_for_tokenization")
"""Methods that a class must have from transformers' base class: then its tokens are those of the `tokenizers` library."""
PROBES = ("", 'A red cat,  under a sign: "MOON" & “Été” 月\n', "a dog " * 40)


@dataclass(frozen=True)
class KeptTokenizer:
    """The part of a tokenizer that text encoders use, by the `tokenizers` library alone."""

    backend: Any
    """A `tokenizers.Tokenizer`."""
    about: Mapping[str, Any]
    """Its "words" (how many), and how it pads and truncates."""

    @classmethod
    def of_entry(cls, entry: Entry) -> KeptTokenizer:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(entry.arrays["tokenizer"].tobytes().decode()), entry.about)

    def __len__(self) -> int:
        return self.about["words"]

    def __call__(
        self,
        text: str,
        *,
        max_length: int,
        padding: Literal["max_length"] = "max_length",
        truncation: Literal[True] = True,
        return_tensors: Literal["np"] = "np",
    ) -> dict[str, np.ndarray]:
        """``input_ids`` and ``attention_mask`` [1, max_length] of `text`, as transformers give them with these options."""
        self.backend.enable_truncation(max_length, direction=self.about["truncation_side"])
        self.backend.enable_padding(length=max_length, **self.about["padding"])
        found = self.backend.encode(text)
        return {"input_ids": np.array([found.ids]), "attention_mask": np.array([found.attention_mask])}


def open_tokenizer(folder: Path, kept: Kept, make: Callable[[Path], Any]) -> Any:
    """The tokenizer in `folder`, as an earlier process has `kept` it, or else what `make`, of transformers, gives."""
    key = [[path.name, file_sha256(path)] for path in sorted(folder.iterdir()) if path.is_file()]
    if (found := kept.find("tokenizer", key)) is not None:
        return KeptTokenizer.of_entry(found)
    tokenizer = make(folder)
    if kept.folder is not None and (entry := _entry(tokenizer)) is not None:
        kept.add("tokenizer", key, entry)
    return tokenizer


def _entry(tokenizer: Any) -> Entry | None:
    """What is kept of a tokenizer; None for one that does more than the `tokenizers` library does for it."""
    kind = type(tokenizer)
    base = next((base for base in kind.__mro__ if base.__name__ in BASES), None)
    plain = base is not None and all(getattr(kind, name, None) is getattr(base, name, None) for name in OWN)
    if base is None or not plain or tokenizer.pad_token is None or getattr(tokenizer, "split_special_tokens", False):
        return None
    padding = {
        "direction": tokenizer.padding_side,
        "pad_id": tokenizer.pad_token_id,
        "pad_type_id": tokenizer.pad_token_type_id,
        "pad_token": tokenizer.pad_token,
    }
    about = {"words": len(tokenizer), "truncation_side": tokenizer.truncation_side, "padding": padding}
    state = np.frombuffer(tokenizer.backend_tokenizer.to_str().encode(), np.uint8)
    entry = Entry({"tokenizer": state}, about, [sys.modules[kind.__module__], sys.modules[base.__module__]])
    mine = KeptTokenizer.of_entry(entry)
    return entry if all(_alike(mine, tokenizer, text) for text in PROBES) else None


def _alike(mine: KeptTokenizer, tokenizer: Any, text: str) -> bool:
    options: dict[str, Any] = dict(padding="max_length", max_length=24, truncation=True, return_tensors="np")
    expected = tokenizer(text, **options)
    return all(np.array_equal(value, expected[name]) for name, value in mine(text, **options).items())
