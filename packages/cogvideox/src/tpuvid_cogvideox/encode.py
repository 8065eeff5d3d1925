"""Stage 1 of CogVideoX: a prompt through T5. Source: `CogVideoXPipeline._get_t5_prompt_embeds` of diffusers."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int
from tpuvid.family import Checkpoint, Runtime, T5TextEncoder, build
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel


class CogVideoXTextEncoder(T5TextEncoder):
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        config = AutoConfig.from_pretrained(checkpoint.component("text_encoder"), trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.component("tokenizer"), trust_remote_code=False)
        super().__init__(checkpoint, runtime, module=build(lambda: T5EncoderModel(config)), tokenizer=tokenizer)

    def embed(self, params, input_ids: Int[Array, "B L"], attention_mask: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        # the model was trained on embeddings made without the mask: text attends to padding, and padding's rows are kept
        return self.traced.function("forward", return_dict=False)(params, input_ids=input_ids)[0]
