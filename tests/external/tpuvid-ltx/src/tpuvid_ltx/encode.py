"""Stage 1 of LTX-Video: a prompt through T5. Source: `LTXPipeline._get_t5_prompt_embeds` of diffusers."""

import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tpuvid.contract import GenerationConfig
from tpuvid.family import Checkpoint, Runtime, T5TextEncoder, build
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel


class LTXTextEncoder(T5TextEncoder):
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = AutoConfig.from_pretrained(checkpoint.component("text_encoder"), trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.component("tokenizer"), trust_remote_code=False)
        super().__init__(checkpoint, runtime, module=build(lambda: T5EncoderModel(config)), tokenizer=tokenizer)

    def embed(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        # without the mask, as the reference has it: only the transformer leaves padding out
        return self.traced.function("forward", return_dict=False)(params, input_ids=input_ids)[0]

    def encode(self, config: GenerationConfig, *, negative: bool) -> dict[str, np.ndarray]:
        """``prompt_embeds`` [1, L, E] and ``prompt_attention_mask`` [1, L] (0: padding); if `negative`, those of it too."""
        options = dict(padding="max_length", max_length=config.max_sequence_length, truncation=True, return_tensors="np")
        tensors = {}
        for name in ("prompt", "negative_prompt") if negative else ("prompt",):
            tokens = self.tokenizer(getattr(config, name), **options)
            tensors[f"{name}_embeds"] = self.run(self.embed, tokens)
            tensors[f"{name}_attention_mask"] = tokens["attention_mask"].astype(np.int32)
        return tensors
