"""encode → denoise → decode over one model: each stage alone, or all in one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tpuvid.compute.kept_programs import KeptPrograms, environment
from tpuvid.compute.outline import code_of
from tpuvid.compute.packs.pack import with_pack
from tpuvid.compute.progress import current
from tpuvid.compute.run_key import run_key, stages_key, traced_modules
from tpuvid.compute.runtime import Runtime, enable_compilation_cache, plugin_tables
from tpuvid.compute.stage_loader import loader_of, open_stage
from tpuvid.contract.digests import tensors_digest
from tpuvid.contract.models import ModelSpec
from tpuvid.contract.options import Options
from tpuvid.contract.settings import EMBEDDED, GenerationConfig, require_prompt
from tpuvid.contract.stages import STAGES
from tpuvid.contract.values import Conditioning, History, Latents, StepCallback, check_finite
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.digests import file_sha256
from tpuvid.files.kept import Kept
from tpuvid.files.lora import read_loras
from tpuvid.files.versions import distribution_version
from tpuvid.plugin.lookup import check_origin, resolve_model
from tpuvid.runs.control import Cancelled, Control
from tpuvid.runs.follower import Follower
from tpuvid.runs.kept.identity import RunIdentity
from tpuvid.runs.kept.savepoints import Savepoints
from tpuvid.runs.video import Video


def load(
    model: str,
    *,
    keep_loaded: bool = True,
    keep_programs: bool = False,
    **options: Any,
) -> Pipeline:
    """A pipeline for `model`; a stage's weights are loaded when it first runs.

    Args:
        model: registered id, local diffusers folder, or Hub id.
        keep_loaded: keep every stage's weights and compiled programs for the next call. False frees each stage before the
            next one loads, for models whose stages don't fit in memory together. A text encoder on an accelerator is
            always freed before denoising.
        keep_programs: start from what earlier processes have traced and compiled, and leave the same for later ones, in
            TPUVID_CACHE_DIR, as the ``tpuvid`` command does. Not for a process that monkeypatches tpuvid, diffusers or
            transformers: what is kept doesn't know of it.
        options: the fields of `Options`, as keywords.

    Raises:
        InputError: unknown model, incomplete checkpoint, damaged pack, or options that this machine can't run.
    """
    asked = Options(**options)
    spec, checkpoint = resolve_model(model, decoder=asked.decoder)
    asked.check()
    checkpoint = replace(checkpoint, loras=read_loras(asked.lora_path, asked.lora_scale))
    if checkpoint.loras and "lora" not in spec.takes:
        raise InputError(f"lora_path={asked.lora_path}: {spec.model_id} merges no LoRA files; leave it out")
    asked = with_pack(asked)
    enable_compilation_cache()
    kept = KeptPrograms(Kept.in_cache(environment()) if keep_programs else None)
    runtime = Runtime.create(asked, kept=kept)
    return Pipeline(spec, checkpoint, runtime, keep_loaded=keep_loaded)


class Pipeline:
    """The three stages of one model. Made by `tpuvid.load`."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, runtime: Runtime, *, keep_loaded: bool = True):
        self.spec, self.checkpoint, self.runtime, self.keep_loaded = spec, checkpoint, runtime, keep_loaded
        self._opened: dict[str, Any] = {}
        self._loaded: set[str] = set()
        self._fits: set[tuple] = set()

    def generate(
        self, prompt: str, *, on_step: StepCallback | None = None, control: Control | None = None, **settings: Any
    ) -> Video:
        """A video of `prompt`. `settings` are the fields of `GenerationConfig`; what is not given is the model's default.

        `control` cancels the run, keeps savepoints and shows previews. Raises `InputError` for settings that break the
        model's rules, before anything is loaded, and `Cancelled`.
        """
        require_prompt(prompt)
        config = self.spec.configure(prompt=prompt, **settings).with_drawn_seed()
        self.verify()
        config = self.resolve(config)
        self.check_pack(config)
        self.read_ahead()
        latents = self.denoise_config(self.encode_config(config), config, on_step=on_step, control=control)
        if control and control.cancel.cancelled:  # in the last step
            raise Cancelled(config.num_inference_steps, config.num_inference_steps, None, config.seed)
        return self.decode(latents)

    def encode(self, prompt: str, negative_prompt: str = "", *, max_sequence_length: int | None = None) -> Conditioning:
        """Stage 1: embed the prompt and the negative prompt."""
        require_prompt(prompt)
        config = self.spec.configure(prompt=prompt, negative_prompt=negative_prompt, max_sequence_length=max_sequence_length)
        return self.encode_config(config, negative=True)

    def encode_config(self, config: GenerationConfig, *, negative: bool | None = None) -> Conditioning:
        """Stage 1 for a checked config; the negative prompt is embedded where guidance needs it, or as `negative` says."""
        self.check_pack(config, "encode")
        negative = config.do_classifier_free_guidance if negative is None else negative
        with self._stage("encode") as encoder, current().phase("encode"):
            tensors = encoder.encode(config, negative=negative)
        conditioning = Conditioning(
            model_id=self.spec.model_id,
            **{name: getattr(config, name) for name in EMBEDDED},
            tensors=tensors,
            history={"encode": self._record("encode")},
            fingerprint=self.checkpoint.fingerprint(),
        )
        conditioning.check()
        return conditioning

    def denoise(
        self,
        conditioning: Conditioning,
        *,
        on_step: StepCallback | None = None,
        control: Control | None = None,
        **settings: Any,
    ) -> Latents:
        """Stage 2: noise → latents. Arguments as of `generate`; raises `InputError` for another model's conditioning."""
        config = self.spec.configure(**settings, **_asked_of(conditioning)).with_drawn_seed()
        return self.denoise_config(conditioning, config, on_step=on_step, control=control)

    def denoise_config(
        self,
        conditioning: Conditioning,
        config: GenerationConfig,
        *,
        on_step: StepCallback | None = None,
        control: Control | None = None,
    ) -> Latents:
        """Stage 2 for a checked config."""
        (latents,) = self.denoise_batch([conditioning], [config], on_step=on_step, control=control)
        latents.check()
        return latents

    def denoise_batch(
        self,
        conditionings: Sequence[Conditioning],
        configs: Sequence[GenerationConfig],
        *,
        on_step: StepCallback | None = None,
        control: Control | None = None,
    ) -> list[Latents]:
        """Stage 2 of several videos at once, whose checked configs differ in nothing but prompts and seeds.

        Weights are read from memory once for all of them, and a mesh's dp splits them. Which videos share a batch may change
        the last bits of each. Raises `InputError` as `denoise` does; that latents are finite is left to `Latents.check`.
        """
        if not configs or len(configs) != len(conditionings):
            raise InputError(
                f"{len(conditionings)} embeddings and {len(configs)} settings: a batch needs one of each per video"
            )
        configs = [self.resolve(config) for config in configs]
        config = configs[0]
        if other := next((c.prompt for c, e in zip(configs, conditionings, strict=True) if c.prompt != e.prompt), None):
            raise InputError(f"the embeddings are not of the prompt {other[:80]!r}; encode it")
        if len({config.batch_key() for config in configs}) != 1:
            raise InputError("the videos of a batch differ in more than prompts and seeds; denoise them apart")
        for conditioning in conditionings:
            check_origin("embeddings", conditioning, self.spec, self.checkpoint)
            if config.do_classifier_free_guidance and "negative_prompt_embeds" not in conditioning.tensors:
                raise InputError(
                    f"guidance_scale={config.guidance_scale} needs negative_prompt_embeds, which these embeddings lack; "
                    "encode again, or pass guidance_scale=1.0"
                )
        self.check_pack(config, "denoise")
        if self.runtime.text_encoder_shares_memory:
            self._forget("encode")
        for conditioning in conditionings:
            self._open("denoise").check(conditioning.tensors)
        tensors = _side_by_side([conditioning.tensors for conditioning in conditionings])
        follower = self._follower(control or Control(), on_step, configs, tensors)
        with self._stage("denoise") as denoiser:
            found = denoiser.denoise(tensors, config, follower.loop(tuple(c.seed for c in configs)))
        record = self._record("denoise") | ({"batch_size": len(configs)} if len(configs) > 1 else {})
        results = [
            Latents(
                model_id=self.spec.model_id,
                tensors={name: value[i : i + 1] for name, value in found.items()},
                config=configs[i],
                history={**conditioning.history, "denoise": record},
                fingerprint=self.checkpoint.fingerprint(),
                prompts_sha256=conditioning.prompts_sha256,
            )
            for i, conditioning in enumerate(conditionings)
        ]
        follower.finish(results)
        return results

    def _follower(
        self,
        control: Control,
        on_step: StepCallback | None,
        configs: Sequence[GenerationConfig],
        tensors: Mapping[str, np.ndarray],
    ) -> Follower:
        """Carries out `control`; what a savepoint is good for is this very run."""
        run = replace(self.identity(), configs=tuple(configs), conditioning=tensors_digest(tensors)).view("denoising")
        savepoints = Savepoints(Path(control.savepoint_dir), run) if control.savepoint_dir else None
        preview = None
        if control.preview:
            from tpuvid.runs.preview import Preview

            preview = Preview.of(self.spec, self.checkpoint, self._open("decode"), Path(control.preview))
        return Follower(control, configs[0].num_inference_steps, on_step, savepoints, preview)

    def decode(self, latents: Latents) -> Video:
        """Stage 3: latents → frames."""
        chunks = list(self.decode_chunks(latents))
        tensors = {name: np.concatenate([chunk[name] for chunk in chunks], axis=1) for name in chunks[0]}
        config, history = self.decoded(latents, tensors["frames"].shape)
        return Video(model_id=self.spec.model_id, tensors=tensors, config=config, history=history)

    def decoded(self, latents: Latents, shape: tuple[int, ...]) -> tuple[GenerationConfig, History]:
        """Settings and history of the video that `decode_chunks` has made of `latents`: frames of `shape` [B, F, H, W, C]."""
        _, num_frames, height, width, _ = shape  # what a foreign file says of them may be missing or wrong
        if (latents.config.num_frames - 1) // self.spec.rules.frame_step + 1 == latents.latents.shape[2]:
            num_frames = latents.config.num_frames  # as asked, also where a VAE makes a few more of as many latent frames
        config = latents.config.override(num_frames=num_frames, height=height, width=width)
        return config, {**latents.history, "decode": self._record("decode") | {"vae_tiling": self.runtime.vae_tiling}}

    def decode_chunks(self, latents: Latents) -> Iterator[Mapping[str, np.ndarray]]:
        """Stage 3, as chunks of frames [B, n, H, W, C] in [0, 1] that come while the next ones are computed."""
        check_origin("latents", latents, self.spec, self.checkpoint)
        if not (np.issubdtype(latents.latents.dtype, np.floating) or latents.latents.dtype.name == "bfloat16"):
            raise InputError(f"latents are {latents.latents.dtype}, not floating point; denoise again")
        if 0 in latents.latents.shape or not np.isfinite(latents.latents.astype(np.float32)).all():
            raise InputError(f"latents {list(latents.latents.shape)} are empty or hold NaN or infinity; denoise again")
        self.check_pack(latents.config, "decode")
        with self._stage("decode", lambda decoder: decoder.check(latents.tensors)) as decoder:
            for chunk in decoder.decode(latents.tensors):
                check_finite(chunk)
                yield chunk

    def verify(self) -> None:
        """Raise `InputError` unless all three stages are complete and their weights fit, by names and shapes: quick."""
        for components in self.spec.components.values():
            self.checkpoint.require(components)
        for name in STAGES:
            self._open(name)

    def read_ahead(self) -> None:
        """Have the denoiser's weights read from the disk while prompts are encoded: called where both are to come."""
        if "denoise" not in self._loaded:
            self.checkpoint.read_ahead(self.spec.components["denoise"])

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        """`config` with what it leaves to the checkpoint filled in; raises `InputError` for what the checkpoint can't take."""
        self.runtime.check(config)
        return self._open("denoise").resolve(config)

    def check_pack(self, config: GenerationConfig, *names: str) -> None:
        """Raise `InputError` unless the pack, if there is one, is for the stages `names` (all by default) of this resolved
        config on these devices, and trusted."""
        pack, names = self.runtime.pack, names or tuple(STAGES)
        known = (names, *config.programs_key().values())
        if pack is None or known in self._fits:
            return
        pack.check(run_key(self.spec, {name: self._open(name) for name in names}, config, self.runtime))
        pack.require_trust()
        self._fits.add(known)

    def _record(self, stage: str) -> dict[str, Any]:
        """What a stage keeps with its result about how it ran, JSON-ready."""
        revision = self.checkpoint.revision(self.spec.components[stage][0])
        return {
            "checkpoint": self.checkpoint.source,
            **({"revision": revision} if revision else {}),
            "loras": self.checkpoint.lora_record(),
            "dtype": self.runtime.dtype.name,
            "tpuvid_version": distribution_version("tpuvid-core"),
            **current().take(),
        }

    def identity(self) -> RunIdentity:
        """What identifies its runs, but for the settings."""
        return RunIdentity.of(self.spec, self.checkpoint, self.runtime.asked(), revision=self.revision())

    def revision(self) -> str | None:
        """The commit of a Hub repository whose diffusion model runs; None for a folder."""
        return self.checkpoint.revision(self.spec.components["denoise"][0])

    def free(self) -> None:
        """Forget every stage's weights and compiled programs; they load again when needed."""
        for name in STAGES:
            if name in self._loaded:
                self._forget(name)

    def _open(self, name: str) -> Any:
        """The stage `name`, made from its configs and found to fit its weights, which are not loaded yet."""
        if name not in self._opened:
            self.checkpoint.require(self.spec.components[name])
            with current().phase(f"open {STAGES[name]}", detail=True):
                try:
                    runtime = replace(self.runtime, kept=self.runtime.kept.of_a_stage())
                    stage = open_stage(self.spec, name, self.checkpoint, runtime)
                    stage.verify()
                except (TpuvidError, ImportError):
                    raise
                except Exception as error:  # whatever a library makes of a config that it can't use
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    parts = ", ".join(self.spec.components[name])
                    raise InputError(
                        f"{self.checkpoint.source}: {parts} can't be used ({reason}); download the checkpoint again"
                    ) from error
            self._serve_kept(name, stage, runtime)
            self._opened[name] = stage
        return self._opened[name]

    def _serve_kept(self, name: str, stage: Any, runtime: Runtime) -> None:
        """Serve programs of earlier processes to the stage `name`."""
        tables = [file_sha256(path) for path in plugin_tables()]
        modules = traced_modules(stage)  # without the stage, which would keep its weights by referring to itself
        runtime.kept.serve(
            [loader_of(self.spec, name), stages_key({name: stage}, runtime), tables],
            lambda: code_of(*(traced.module for traced in modules)),
        )

    @contextmanager
    def _stage(self, name: str, check: Callable[[Any], None] = lambda stage: None) -> Iterator[Any]:
        """The stage `name`, its inputs checked and then its weights loaded; freed afterwards unless `keep_loaded`."""
        stage = self._open(name)
        check(stage)
        if name not in self._loaded:
            with current().phase(f"load {STAGES[name]}"):
                stage.load()
            self._loaded.add(name)
        try:
            yield stage
        except BaseException:
            current().take()  # so that the next video's record says nothing of this one
            raise
        finally:
            if not self.keep_loaded:
                self._forget(name)

    def _forget(self, name: str) -> None:
        stage = self._opened.pop(name, None)
        if name in self._loaded:
            self._loaded.discard(name)
            del stage
            gc.collect()  # a stage that refers to itself would keep its weights until Python looks for such cycles


def _asked_of(conditioning: Conditioning) -> dict[str, Any]:
    """The settings that the embeddings have decided."""
    length = conditioning.max_sequence_length or conditioning.tensors["prompt_embeds"].shape[1]
    return {name: getattr(conditioning, name) for name in EMBEDDED} | {"max_sequence_length": length}


def _side_by_side(tensors: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Conditioning of several prompts as that of a batch; what only some have (of a negative prompt) plays no part."""
    names = [name for name in tensors[0] if all(name in other for other in tensors)]
    return {name: np.concatenate([each[name] for each in tensors]) for name in names}
