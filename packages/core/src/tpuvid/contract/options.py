"""How a video is computed, as users say it: what `tpuvid.load` takes. Imports neither jax nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpuvid.contract.layout import MeshConfig
from tpuvid.contract.stages import STAGES
from tpuvid.contract.table import check_partners, setting, table_of

ALL = tuple(STAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `tpuvid.load` takes beside the model, by keyword. All that tpuvid knows of an option stands with its field."""

    lora_path: str | Path | None = setting(
        None, help="A LoRA (safetensors) to merge into the diffusion model.", enters=("denoise",)
    )
    lora_scale: float | None = setting(
        None, help="How much of the LoRA. [default: 1.0]", enters=("denoise",), partner="lora_path"
    )
    mesh: str | MeshConfig | None = setting(
        None, help="Layout of the denoiser like dp=2,tp=4. Default by devices, heads and widths.", reads=MeshConfig.of,
        enters=("denoise",), programs=True, recorded=True, portable=True,
    )  # fmt: skip
    """The layout as text ("dp=2,sp=4", "dp=2,tp=4"), or a `MeshConfig`."""
    vae_tiling: bool = setting(
        False, help="Decode in overlapping tiles: less device memory, slightly other frames.", enters=("decode",),
        programs=True, recorded=True,
    )  # fmt: skip
    """Whether to decode in tiles, as with diffusers' ``vae.enable_tiling()``: it gives another video."""
    decoder: str | None = setting(
        None, help="Another decoder than the model's own; tpuvid list-models says which there are.", enters=("decode",),
        programs=True, recorded=True,
    )  # fmt: skip
    text_encoder_device: str = setting(
        "device", help="Where text encoders run: on the accelerator, which they leave before denoising, or on the CPU.",
        choices=("device", "cpu"), show_default=True, enters=("encode",), programs=True, recorded=True,
    )  # fmt: skip
    dtype: str | None = setting(
        None, help="Default: bfloat16; float32 on a CPU.", choices=("bfloat16", "float32"), enters=ALL, programs=True,
        recorded=True,
    )  # fmt: skip
    """The dtype of weights and activations."""
    attention_backend: str = setting(
        "auto", help="flash-int8 is faster and less exact: see docs/attention.md.", show_default=True,
        choices=("auto", "xla", "flash", "flash-smooth-k", "flash-int8", "splash", "cudnn"), enters=ALL, programs=True,
        recorded=True,
    )  # fmt: skip
    """All but "auto", "xla" and "cudnn" (of GPUs) are kernels of TPUs."""
    warmup_steps: int = setting(0, help="Runs before the first step.", range=(0, None), show_default=True)
    """How often every denoising program runs before the first step that counts; the result is the same."""
    profile: str | Path | None = setting(
        None, help="Folder for a JAX profile of denoising steps.", rule="needs the path of a folder"
    )
    """The folder for a profile of steady steps, to be opened in XProf or Perfetto."""
    pack: Any = setting(None, help="File of tpuvid compile: its programs need not be compiled.")
    """The file, or what `read_pack` has made of it; what it lacks is compiled, and the history says so."""
    trust_pack: bool = setting(
        False, help="Run the machine code in --pack: say so if you made it or trust who did.", partner="pack"
    )
    """The pack holds machine code; without this it is checked, and then refused."""

    def check(self) -> None:
        """Raise `InputError` for what no machine could run with."""
        for name, each in OPTIONS.items():
            each.check(getattr(self, name))
        check_partners(OPTIONS, self)

    def given(self) -> dict[str, Any]:
        """The options as `tpuvid.load` takes them."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def layout(self) -> MeshConfig | None:
        return None if self.mesh is None else MeshConfig.of(self.mesh)

    def key(self, *stages: str) -> dict[str, Any]:
        """What the results of `stages` depend on, JSON-ready; of LoRAs and decoders, files say more."""
        found = {name: each for name, each in RECORDED.items() if not each.portable and set(stages) & set(each.enters)}
        return {name: getattr(self, name) for name in found}

    def recorded(self) -> dict[str, Any]:
        """What decides what is computed, as `tpuvid.load` takes it, JSON-ready."""
        return {name: getattr(self, name) for name in RECORDED} | {"mesh": self.mesh and str(self.layout)}


OPTIONS = table_of(Options)
RECORDED = {name: each for name, each in OPTIONS.items() if each.recorded}
