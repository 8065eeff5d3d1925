"""What a model says about itself, without importing anything heavy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tpuvid.contract.settings import OPTIONAL_SETTINGS, GenerationConfig, check_sampling, cleaned
from tpuvid.contract.sizes import SizeRules
from tpuvid.contract.stepcache import StepCache, fill_cache_settings
from tpuvid.contract.window_size import WindowSize
from tpuvid.errors import InputError

API_VERSION = 3
"""3: plugins import from `tpuvid.contract` and `tpuvid.family`."""
OPTIONAL_FEATURES = {
    "lora": "merges LoRA files",
    "fps": "denoises for a frame rate, so that its latents can't be played at another",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """What `tpuvid plugin check` runs a family with, on a CPU. Callables are named "module:callable", imported when called."""

    random_checkpoint: str
    """Called with a folder (Path): writes a small checkpoint of random weights into it, in the layout of the family's own."""
    settings: Mapping[str, Any]
    """The settings of a small video with guidance, as `ModelSpec.configure` takes them."""
    reference: str | None = None
    """Called with (folder, GenerationConfig): runs the pipeline that the family must agree with, in float32, and returns numpy
    arrays under "latents" [1, C, f, h, w], "frames" [1, F, H, W, 3] in [0, 1] and, if it likes, names of
    `Conditioning.tensors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model, described without importing anything heavy."""

    model_id: str
    family: str
    pipeline_class: str
    """``_class_name`` in a checkpoint's model_index.json."""
    checkpoint: str
    """A Hub repository ("owner/name") or a folder inside a Python package ("package:folder")."""
    configs: str | None = None
    """A folder inside a Python package that holds the checkpoint's configs, for planning without a network."""
    parameters: str
    """Size of the diffusion model as published, for people: "14.3B"."""
    signature: Mapping[str, Any]
    """Values of transformer/config.json that tell this model from its siblings."""
    defaults: GenerationConfig
    rules: SizeRules
    flow_shifts: tuple[tuple[int, float], ...] = ()
    """(least pixels per frame, flow_shift), largest first; below the last, the checkpoint's own shift holds."""
    takes: tuple[str, ...] = ()
    """What this model has of what only some have (`OPTIONAL_SETTINGS`, `OPTIONAL_FEATURES`)."""
    components: Mapping[str, tuple[str, ...]]
    """The checkpoint's subfolders that each of the stages "encode", "denoise" and "decode" needs."""
    load_text_encoder: str
    load_denoiser: str
    load_decoder: str
    """Each "module:callable", called with (Checkpoint, Runtime) when its stage first runs; gives a `Stage`."""
    api_version: int
    """The `API_VERSION` that the package was written for, as a number: it must not follow what is installed."""
    preview: str | None = None
    """A file inside a Python package ("package:file.json") with the map of ``--preview`` from latents to colours: see
    `tpuvid.runs.preview`. None: it is fitted with the checkpoint's own VAE when it is first asked for."""
    conformance: Conformance | None = None
    """None: `tpuvid plugin check` runs the model's own checkpoint, where that is a folder inside a package."""
    twin: str | None = None
    """The registered model whose description it runs with, where it is a folder or repository that is not registered."""
    decoder: str | None = None
    """The name of the `DecoderSpec` that `load_decoder` and ``components["decode"]`` have been taken from."""
    step_caches: Mapping[str, type[StepCache]] | None = field(default=None, compare=False, repr=False)
    """Registered step caches by name, with which `configure` checks ``cache``: the registry gives models that know them."""

    def configure(self, **settings: Any) -> GenerationConfig:
        """The model's defaults with `settings` (None: not given), checked; raises `InputError`."""
        config = self.defaults.override(**{name: cleaned(name, value) for name, value in settings.items()})
        for name, purpose in OPTIONAL_SETTINGS.items():
            if (value := getattr(config, name)) not in (None, False) and name not in self.takes:
                raise InputError(f"{name}={value}: {self.model_id} has no {purpose}; leave it out")
        if config.flow_shift is None:
            pixels = config.height * config.width
            shift = next((shift for least, shift in self.flow_shifts if pixels >= least), None)
            config = replace(config, flow_shift=shift)
        check_sampling(config)
        try:
            self.rules.check(height=config.height, width=config.width, num_frames=config.num_frames)
        except InputError as error:
            raise InputError(f"{error} ({self.model_id})") from None
        if config.window_size is not None:
            config = replace(config, window_size=str(WindowSize.parse(config.window_size)))
        return fill_cache_settings(config, self.step_caches)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Another decoder for registered models, which ``--decoder NAME`` puts in the place of their own."""

    name: str
    models: tuple[str, ...]
    """The ids of the models, or the families, whose latents it decodes."""
    checkpoint: str
    """Where the folder `component` is: a repository or a folder, as in `ModelSpec`."""
    component: str
    """The folder with its config.json and weights. Named unlike the components of the models."""
    load_decoder: str
    """The callable that makes it, "module:callable", as in `ModelSpec`."""
    api_version: int

    def serves(self, spec: ModelSpec) -> bool:
        return bool({spec.model_id, spec.twin, spec.family} & set(self.models))


def imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
