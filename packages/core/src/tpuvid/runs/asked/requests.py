"""What ``tpuvid generate`` is asked for: which videos, and how they are written. Imports neither jax nor torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpuvid.compute.run_key import settings_key
from tpuvid.contract.models import ModelSpec
from tpuvid.contract.options import Options
from tpuvid.contract.settings import GenerationConfig, require_prompt
from tpuvid.errors import InputError
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.lora import read_loras
from tpuvid.plugin.lookup import resolve_model
from tpuvid.runs.asked.items import Item, parse_sweep, several, swept
from tpuvid.runs.asked.names import names_of, said_of
from tpuvid.runs.asked.prompts import read_prompts
from tpuvid.runs.kept.identity import RunIdentity
from tpuvid.runs.kept.work import Manifest, Work
from tpuvid.runs.outputs import Outputs

OUTPUTS = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How results are written."""

    output: Path | None = None
    output_dir: Path | None = None
    overwrite: bool = False
    save_frames: bool = False
    metadata: bool = True
    prompt_in_metadata: bool = True

    @property
    def folder(self) -> Path:
        return self.output.parent if self.output else self.output_dir or OUTPUTS

    def video(self, name: str) -> Path:
        return self.output or self.folder / name

    def outputs(self, name: str, *, request: str, overwrite: bool) -> Outputs:
        return Outputs(
            video=self.video(name),
            request=request,
            overwrite=self.overwrite or overwrite,
            save_frames=self.save_frames,
            metadata=self.metadata,
            prompt_in_metadata=self.prompt_in_metadata,
        )


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One video as it was asked for."""

    item: Item
    config: GenerationConfig
    key: str
    """The hash of everything that the video depends on."""
    work: Work
    outputs: Outputs

    @property
    def name(self) -> str:
        return self.outputs.video.name


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A request of ``tpuvid generate``, found to be right."""

    model: str
    spec: ModelSpec
    checkpoint: Checkpoint
    options: Options
    keeping: Keeping
    items: Sequence[Item]
    settings: Mapping[str, Any]
    """The settings for items that give none of their own."""
    many: bool
    """Names are the same each time, and what is done is kept track of."""
    batch_size: int = 1
    resume: bool = False
    savepoint_every: int | None = None
    preview_every: int | None = None

    @property
    def folder(self) -> Path:
        return self.keeping.folder

    @property
    def goes_on(self) -> bool:
        """Whether what an earlier run has kept is used."""
        return self.resume or self.many

    @property
    def how_to_go_on(self) -> str:
        """What its user does after a run that was stopped or has failed, where something is kept."""
        return f"what is done is kept; the same command {'' if self.many else 'with --resume '}goes on"

    @property
    def is_sweep(self) -> bool:
        return any(item.swept for item in self.items)

    def identity(self) -> RunIdentity:
        """What all its videos have in common."""
        checkpoint = replace(self.checkpoint, loras=read_loras(self.options.lora_path, self.options.lora_scale))
        keeping = self.keeping
        return RunIdentity.of(
            self.spec, checkpoint, self.options, metadata=keeping.metadata, prompt_in_metadata=keeping.prompt_in_metadata
        )

    def wanted(self, manifest: Manifest | None) -> list[Wanted]:
        """Every video, with its name; raises `InputError` for one that can't be made or written."""
        identity, keeping = self.identity(), self.keeping
        asked = [self._asked(item) for item in self.items]
        name = "batch" if self.many else f"video-{identity.key('folder', asked[0])}"
        work = Work(self.folder, name, identity, private=not keeping.prompt_in_metadata)
        configs = self._with_seeds(asked, manifest, work)
        keys = [identity.key("request", config) for config in configs]
        names = names_of(self.items, configs, keys, manifest, with_prompt=keeping.prompt_in_metadata)
        found = []
        for item, config, key, name in zip(self.items, configs, keys, names, strict=True):
            begun = manifest.was_begun(name, key) if manifest else self.resume and work.was_begun(self.keeping.video(name))
            outputs = self.keeping.outputs(name, request=key, overwrite=begun)
            found.append(Wanted(item=item, config=config, key=key, work=work, outputs=outputs))
        return found

    def _asked(self, item: Item) -> GenerationConfig:
        try:
            config = self.spec.configure(**{**self.settings, **item.settings})
            if pack := self.options.pack:
                pack.check(settings_key(self.spec, config))
        except InputError as error:
            item.raise_as(error)
        return config

    def _with_seeds(self, asked: Sequence[GenerationConfig], manifest: Manifest | None, work: Work) -> list[GenerationConfig]:
        """The configs, with a drawn seed where −1 is asked for, which stays the same for the same request."""
        drawn: Counter = Counter()
        configs = []
        for config in asked:
            with_seed = config.with_drawn_seed()
            if with_seed is not config and manifest:
                drawn[config] += 1  # of several that are alike, the first has the first seed
                request = [self.spec.model_id, config.to_dict(), drawn[config]]
                with_seed = replace(config, seed=manifest.seed(request, with_seed.seed))
            elif with_seed is not config and self.resume and (seed := work.seed()) is not None:
                with_seed = replace(config, seed=seed)
            configs.append(with_seed)
        return configs


def plan_generation(
    model: str,
    *,
    prompt: str | None,
    prompts: str | None,
    num_videos: int,
    sweep: Sequence[str],
    settings: Mapping[str, Any],
    options: Options,
    keeping: Keeping,
    **how: Any,
) -> Generation:
    """The request that flags make; raises `InputError` for those that don't go together. `how`: fields of `Generation`."""
    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt or --prompts")
    if keeping.output and keeping.output_dir:
        raise InputError(f"give either --output={keeping.output} or --output-dir={keeping.output_dir}")
    axes = parse_sweep(sweep)
    spec, checkpoint = resolve_model(model, decoder=options.decoder)
    if prompts is None:
        require_prompt(prompt)
    items = [Item({"prompt": prompt})] if prompts is None else read_prompts(prompts)
    items = swept(several(items, num_videos, settings.get("seed", spec.defaults.seed)), axes)
    many = prompts is not None or len(items) > 1
    if many and keeping.output:
        raise InputError(f"--output={keeping.output}: names one file, and {len(items)} videos are asked for; use --output-dir")
    if many and keeping.save_frames:
        raise InputError(
            f"--save-frames writes one stage3_frames.safetensors, and {len(items)} videos are asked for; make them one by one"
        )
    if axes and not keeping.output_dir:
        keeping = replace(
            keeping, output_dir=OUTPUTS / f"{said_of(items[0].settings['prompt'], keeping.prompt_in_metadata)}_sweep"
        )
    return Generation(
        model=model, spec=spec, checkpoint=checkpoint, options=options, keeping=keeping, items=items, settings=settings,
        many=many, **how,
    )  # fmt: skip
