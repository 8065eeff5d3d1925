"""wan-tiny's tokenizer and text encoder, both new: there is nothing to download."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tpuvid_tiny.grammar import EOS, PAD, UNK, vocabulary
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

MAX_WORDS = 16  # the longest caption has 13 words and the end mark


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, lower-cased, commas and full stops dropped; an end mark as T5 has it."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    without_marks = [normalizers.Replace(mark, " ") for mark in ",."]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *without_marks])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=512
    )


def make_text_encoder(width: int = 128) -> UMT5EncoderModel:
    words = vocabulary()
    config = UMT5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=32,
        num_heads=4,
        d_ff=2 * width,
        num_layers=2,
        num_decoder_layers=0,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        pad_token_id=words.index(PAD),
        eos_token_id=words.index(EOS),
        decoder_start_token_id=words.index(PAD),
    )
    return UMT5EncoderModel(config)


def tokens_of(captions: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Ids and mask, each [B, MAX_WORDS]."""
    rows = tokenizer(captions, padding="max_length", max_length=MAX_WORDS, truncation=True, return_tensors="pt")
    return rows.input_ids, rows.attention_mask


def forget_words(ids: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Replace words by <unk> at ``rate``, so that a word nobody taught does little harm."""
    unknown, end = vocabulary().index(UNK), vocabulary().index(EOS)
    forgotten = (torch.rand(ids.shape, generator=generator) < rate) & (ids > end)
    return torch.where(forgotten, unknown, ids)


def dropped(captions: list[str], rate: float, rng: random.Random) -> list[str]:
    """Empty some captions: classifier-free guidance needs the unconditional answer too."""
    return ["" if rng.random() < rate else caption for caption in captions]
