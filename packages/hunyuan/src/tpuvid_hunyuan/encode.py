"""Stage 1 of HunyuanVideo 1.5: a prompt through Qwen2.5-VL, and the texts quoted in it through byT5, which knows letters.

Source: `HunyuanVideo15Pipeline.encode_prompt` of diffusers, whose template and lengths are used.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from diffusers import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts, format_text_input
from jax import Array
from jaxtyping import Float, Int
from torch import nn
from tpuvid.contract import GenerationConfig
from tpuvid.errors import InputError
from tpuvid.family import T5_RULES, Checkpoint, Encoder, Runtime, Scan, build, check_vocabulary
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, Qwen2_5_VLTextModel, T5EncoderModel

from tpuvid_hunyuan.sharding import QWEN


def _defaults(function: Callable) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


_TEXT = _defaults(HunyuanVideo15Pipeline._get_mllm_prompt_embeds)
SYSTEM_MESSAGE: str = _TEXT["system_message"]
TEMPLATE_TOKENS: int = _TEXT["crop_start"]  # the chat template before the prompt; its embeddings are cut off
SKIPPED_LAYERS: int = _TEXT["num_hidden_layers_to_skip"]
GLYPH_TOKENS: int = _defaults(HunyuanVideo15Pipeline._get_byt5_prompt_embeds)["tokenizer_max_length"]

Tokens = dict[str, Int[np.ndarray, "1 L"]]
"""What a tokenizer gives: "input_ids" and "attention_mask"."""


class HunyuanTextEncoder:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.runtime = runtime
        self.tokenizer, self.glyph_tokenizer = (
            AutoTokenizer.from_pretrained(checkpoint.component(name), trust_remote_code=False)
            for name in ("tokenizer", "tokenizer_2")
        )
        text, glyphs = (
            AutoConfig.from_pretrained(checkpoint.component(n), trust_remote_code=False)
            for n in ("text_encoder", "text_encoder_2")
        )
        layers = text.num_hidden_layers
        unused = ["norm.", *(f"layers.{i}." for i in range(layers - SKIPPED_LAYERS, layers))]
        heads = "num_attention_heads", "num_key_value_heads"
        self.text = Encoder(
            checkpoint, runtime, text_module(text), heads=heads, rules=QWEN, unused=unused, scan={"layers": Scan(1)}
        )
        module = build(lambda: T5EncoderModel(glyphs))
        self.glyphs = Encoder(checkpoint, runtime, module, component="text_encoder_2", heads=("num_heads",), rules=T5_RULES)
        self.glyph_width = glyphs.d_model

    def verify(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("tokenizer: has no chat template, which every prompt goes through; download the tokenizer again")
        if not isinstance(self.glyph_tokenizer, ByT5Tokenizer):
            name = type(self.glyph_tokenizer).__name__
            raise InputError(f"tokenizer_2: is a {name}, not the ByT5Tokenizer of HunyuanVideo 1.5; download it again")
        check_vocabulary("tokenizer", self.tokenizer, self.text)
        check_vocabulary("tokenizer_2", self.glyph_tokenizer, self.glyphs)
        self.text.verify()
        self.glyphs.verify()

    def load(self) -> None:
        self.text.load()
        self.glyphs.load()

    def encode(self, config: GenerationConfig, *, negative: bool) -> dict[str, np.ndarray]:
        """``prompt_embeds`` [1, L, E], ``prompt_embeds_2`` [1, 256, E2] and their masks [1, L] and [1, 256] (1: a token,
        0: padding), and if `negative` the same of the negative prompt; L is ``max_sequence_length``."""
        tensors = self._encode(config.prompt, config.max_sequence_length)
        if negative:
            other = self._encode(config.negative_prompt, config.max_sequence_length)
            tensors |= {f"negative_{name}": value for name, value in other.items()}
        return tensors

    def _encode(self, prompt: str, length: int) -> dict[str, np.ndarray]:
        tokens = tokenize(self.tokenizer, prompt, length)
        embeds = self.text.run(self._embed_text, tokens)[:, TEMPLATE_TOKENS:]
        glyphs = tokenize_glyphs(self.glyph_tokenizer, prompt)
        if glyphs is None:
            embeds_2 = np.zeros((1, GLYPH_TOKENS, self.glyph_width), embeds.dtype)
            mask_2 = np.zeros((1, GLYPH_TOKENS), np.int32)
        else:
            embeds_2, mask_2 = self.glyphs.run(self._embed_glyphs, glyphs), glyphs["attention_mask"]
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": tokens["attention_mask"][:, TEMPLATE_TOKENS:],
            "prompt_embeds_2": embeds_2,
            "prompt_embeds_mask_2": mask_2,
        }

    def _embed_text(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        length = input_ids.shape[1]
        # given ready-made, since transformers builds it in ways that can't be traced
        mask = jnp.tril(jnp.ones((length, length), bool)) & (attention_mask[:, None, None] > 0)
        forward = self.text.traced.function("forward", return_dict=False, use_cache=False)
        return forward(params, input_ids=input_ids, attention_mask={"full_attention": mask})[0]

    def _embed_glyphs(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        forward = self.glyphs.traced.function("forward", return_dict=False)
        return forward(params, input_ids=input_ids, attention_mask=attention_mask)[0]


def text_module(config: Any) -> Qwen2_5_VLTextModel:
    """The text model without its last layers and its final norm, so that its output is ``hidden_states[-3]`` of the whole."""
    if set(config.layer_types) != {"full_attention"}:
        raise InputError(f"text_encoder/config.json: layer_types={config.layer_types}: only full_attention is supported")
    config = copy.deepcopy(config)
    config.num_hidden_layers -= SKIPPED_LAYERS
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    module = build(lambda: Qwen2_5_VLTextModel(config))
    module.norm = nn.Identity()
    return module


def tokenize(tokenizer: Any, prompt: str, length: int) -> Tokens:
    """`prompt` in the chat template, padded to the template's tokens and `length` more."""
    tokens = tokenizer.apply_chat_template(
        format_text_input([prompt], SYSTEM_MESSAGE),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding="max_length",
        max_length=length + TEMPLATE_TOKENS,
        truncation=True,
        return_tensors="np",
    )
    return _int32(tokens)


def tokenize_glyphs(tokenizer: Any, prompt: str) -> Tokens | None:
    """The texts that `prompt` quotes; None where it quotes nothing."""
    texts = extract_glyph_texts(prompt)
    if texts is None:
        return None
    return _int32(tokenizer(texts, padding="max_length", max_length=GLYPH_TOKENS, truncation=True, return_tensors="np"))


def _int32(tokens: Any) -> Tokens:
    return {name: tokens[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
