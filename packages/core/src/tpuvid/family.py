"""All that the stages of a model are made of, in one face: what a model package imports, beside `tpuvid.contract`.

jax and torch come with it, so that a plugin.py doesn't import it.
"""

from tpuvid.compute.bridge import group_statistics, in_strips, map_rows, rotate_heads, scan_rows, token_attention
from tpuvid.compute.guidance import guidance_scales, with_negative
from tpuvid.compute.inputs import check_embeds, check_finite_embeds
from tpuvid.compute.noise import make_generators, make_noise
from tpuvid.compute.parameters import load_parameters, match_parameters
from tpuvid.compute.runtime import LEAST_EFFORT, Runtime, batch_sharded, replicated
from tpuvid.compute.sampler import Sampler
from tpuvid.compute.scanned import Scan
from tpuvid.compute.schedule import Schedule, tabulate
from tpuvid.compute.step_caches import step_cache
from tpuvid.compute.t5 import T5_RULES, T5TextEncoder
from tpuvid.compute.text_encoder import Encoder, check_vocabulary
from tpuvid.compute.tiles import Side, Tiling
from tpuvid.compute.tokenizer import open_tokenizer
from tpuvid.compute.traced import TracedModule, build
from tpuvid.compute.vae_decoder import FRAMES, LATENTS, VaeDecoder, split_evenly
from tpuvid.files.adapters import AdaptedWeights, Delta, LowRank, Offset
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.lora import Lora
from tpuvid.files.weights import Weights

__all__ = [
    "FRAMES", "LATENTS", "LEAST_EFFORT", "T5_RULES", "AdaptedWeights", "Checkpoint", "Delta", "Encoder", "Lora",
    "LowRank", "Offset", "Runtime", "Sampler", "Scan", "Schedule", "Side", "T5TextEncoder", "Tiling", "TracedModule",
    "VaeDecoder", "Weights", "batch_sharded", "build", "check_embeds", "check_finite_embeds", "check_vocabulary",
    "group_statistics", "guidance_scales", "in_strips", "load_parameters", "make_generators", "make_noise", "map_rows",
    "match_parameters", "open_tokenizer", "replicated", "rotate_heads", "scan_rows", "split_evenly", "step_cache",
    "tabulate", "token_attention", "with_negative",
]  # fmt: skip
