"""What tpuvid and its plugins agree on, in one light face: a plugin.py imports from here, without jax and torch.

What runs the stages is in `tpuvid.family`.
"""

from tpuvid.contract.commands import CommandSpec
from tpuvid.contract.hookspecs import hookimpl
from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.loop import Loop, LoopState, StepDone
from tpuvid.contract.models import API_VERSION, OPTIONAL_FEATURES, Conformance, DecoderSpec, ModelSpec
from tpuvid.contract.settings import OPTIONAL_SETTINGS, GenerationConfig
from tpuvid.contract.sizes import SizeRules
from tpuvid.contract.stages import Decoder, Denoiser, Stage, TextEncoder
from tpuvid.contract.stepcache import StepCache
from tpuvid.contract.values import Conditioning, History, Latents
from tpuvid.contract.window_size import WindowSize

__all__ = [
    "API_VERSION", "OPTIONAL_FEATURES", "OPTIONAL_SETTINGS", "CommandSpec", "Conditioning", "Conformance", "Decoder",
    "DecoderSpec", "Denoiser", "GenerationConfig", "History", "Latents", "Loop", "LoopState", "MeshConfig", "ModelSpec",
    "SizeRules", "Stage", "StepCache", "StepDone", "TextEncoder", "WindowSize", "hookimpl",
]  # fmt: skip
