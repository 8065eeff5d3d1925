"""A tokenizer that is kept gives the tokens of transformers' own, or isn't kept."""

from pathlib import Path

import numpy as np
import pytest
import tpuvid_wan.encode
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tpuvid.compute.tokenizer import KeptTokenizer, open_tokenizer
from tpuvid.files.kept import Kept
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

TEXTS = ("a red cat", "", "Été, moon & \u201csign\u201d  \n", "dog " * 90)
WORDS = ["<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581cat", "\u2581dog", "\u2581moon", "\u2581"]


def by_words(folder: Path, **options) -> Path:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options).save_pretrained(folder)
    return folder


def opened(folder: Path, kept: Path):
    kept.mkdir(exist_ok=True)
    return open_tokenizer(folder, Kept(kept, "tests"), tpuvid_wan.encode._tokenizer)


def unigram(folder: Path) -> Path:
    """As UMT5's."""
    T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(WORDS)], extra_ids=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [by_words, unigram])
@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"truncation_side": "left"}], ids=str)
def test_the_kept_one_gives_the_same_tokens(make, options, tmp_path):
    folder = make(tmp_path / "tokenizer")
    if options:
        AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder)
    first, second = (opened(folder, tmp_path / "kept") for _ in range(2))
    assert not isinstance(first, KeptTokenizer) and isinstance(second, KeptTokenizer)
    assert len(first) == len(second)
    for text in TEXTS:
        for length in (5, 64):
            how = dict(padding="max_length", max_length=length, truncation=True, return_tensors="np")
            expected, found = first(text, **how), second(text, **how)
            assert all(np.array_equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))


def test_another_folders_is_not_taken(tmp_path):
    one, other = by_words(tmp_path / "one"), by_words(tmp_path / "other", padding_side="left")
    opened(one, tmp_path / "kept")
    assert not isinstance(opened(other, tmp_path / "kept"), KeptTokenizer)


def test_one_in_python_is_not_kept(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    for _ in range(2):
        assert not isinstance(opened(tmp_path / "tokenizer", tmp_path / "kept"), KeptTokenizer)
    assert not list((tmp_path / "kept").iterdir())
