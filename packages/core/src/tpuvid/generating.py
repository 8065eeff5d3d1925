"""``tpuvid generate``: from what was asked for, over what is there already, to videos.

Imports neither jax nor torch before the request has been found to be right.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpuvid.artifacts import check_output, digest_of
from tpuvid.checkpoint import Checkpoint, resolve_model
from tpuvid.control import Cancelled, CancelToken, Control
from tpuvid.errors import DEBUG_VARIABLE, InputError, TpuvidError, unexpected
from tpuvid.items import Item, parse_sweep, read_prompts, several, slug, swept
from tpuvid.locks import locked
from tpuvid.lora import read_loras
from tpuvid.outputs import Outputs, Written
from tpuvid.record import is_written_as
from tpuvid.run_key import settings_key
from tpuvid.stages import GenerationConfig, History, ModelSpec
from tpuvid.stopping import exit_code, stoppable
from tpuvid.sweep import INDEX_PAGE, SHEET, Cell, write_pages
from tpuvid.work import BATCH, Manifest, Work

if TYPE_CHECKING:
    from tpuvid.batch import Job
    from tpuvid.pipeline import Pipeline

EXIT_SOME_FAILED = 3
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

    def stem(self, prompt: str) -> str:
        """What a name may say of the prompt."""
        return slug(prompt) if self.prompt_in_metadata else "video"

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
    """Of everything that the video depends on."""
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
    options: Mapping[str, Any]
    keeping: Keeping
    items: Sequence[Item]
    settings: Mapping[str, Any]
    """For items that give none of their own."""
    many: bool
    """Names are the same each time, and what is done is kept track of."""
    batch_size: int = 1
    resume: bool = False
    checkpoint_every: int | None = None
    preview_every: int | None = None

    @property
    def folder(self) -> Path:
        return self.keeping.folder

    @property
    def is_sweep(self) -> bool:
        return any(item.swept for item in self.items)

    def origin(self) -> dict[str, Any]:
        """What the latents of all its videos have in common."""
        loras = read_loras(self.options["lora_path"], self.options["lora_scale"])
        asked = {name: self.options[name] for name in ("dtype", "attention_backend", "text_encoder_device")}
        return {
            "model_id": self.spec.model_id,
            "checkpoint": self.checkpoint.source if self.checkpoint.folder is None else None,
            "fingerprint": self.checkpoint.fingerprint(),
            "loras": replace(self.checkpoint, loras=loras).lora_record(),
            **asked,
        }

    def wanted(self, manifest: Manifest | None) -> list[Wanted]:
        """Every video, with its name; raises `InputError` for one that can't be made or written."""
        origin, keeping = self.origin(), self.keeping
        how = [self.options["vae_tiling"], self.checkpoint.others_record(), keeping.metadata, keeping.prompt_in_metadata]
        asked = [self._asked(item) for item in self.items]
        name = "batch" if self.many else f"video-{digest_of([origin, asked[0].to_dict()])[:16]}"
        work = Work(self.folder, name)
        configs = self._with_seeds(asked, manifest, work)
        keys = [digest_of([origin, how, config.to_dict()])[:16] for config in configs]
        names = self._names(configs, keys, manifest)
        found = []
        for item, config, key, name in zip(self.items, configs, keys, names, strict=True):
            begun = manifest.was_begun(name, key) if manifest else self.resume and work.was_begun(self.keeping.video(name))
            outputs = self.keeping.outputs(name, request=key, overwrite=begun)
            found.append(Wanted(item=item, config=config, key=key, work=work, outputs=outputs))
        return found

    def _asked(self, item: Item) -> GenerationConfig:
        try:
            config = self.spec.configure(**{**self.settings, **item.settings})
            if pack := self.options.get("pack"):
                pack.check(settings_key(self.spec, config))
        except InputError as error:
            item.raise_as(error)
        return config

    def _with_seeds(self, asked: Sequence[GenerationConfig], manifest: Manifest | None, work: Work) -> list[GenerationConfig]:
        """With a drawn one where −1 is asked for, which stays the same for the same request."""
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

    def _names(self, configs: Sequence[GenerationConfig], keys: Sequence[str], manifest: Manifest | None) -> list[str]:
        """Of a batch they stay what they were, whatever is added to it."""
        first: dict[str, Item] = {}
        for item, key in zip(self.items, keys, strict=True):
            if key in first:
                raise InputError(
                    f"{item.where or 'sweep'}: has the prompt, the seed and all settings of "
                    f"{first[key].where or 'another one'}, and would be the same video; change the seed, or leave it out"
                )
            first[key] = item
        if manifest is None:
            return [f"{self._stem(configs[0])}_{time.strftime('%Y%m%d-%H%M%S')}.mp4"]
        names = [item.output or self._stem(config, item.swept) for item, config in zip(self.items, configs, strict=True)]
        names = [name if name.endswith(".mp4") else f"{name}.mp4" for name in names]
        times = Counter(names)
        for item, name in zip(self.items, names, strict=True):
            if item.output and times[name] > 1:
                raise InputError(f"{item.where}: output={item.output!r}: is the name of two videos; give each its own")
        own = manifest.names()
        taken = set(own.values())
        found = []
        for item, name, key in zip(self.items, names, keys, strict=True):
            if key in own and not item.output:
                name = own[key]
            elif not item.output and (times[name] > 1 or name in taken):
                name = f"{name[:-4]}_{key[:6]}.mp4"
            found.append(name)
        return found

    def _stem(self, config: GenerationConfig, values: Mapping[str, Any] = {}) -> str:
        """Prompt, seed and what was swept: "a-red-circle_42_guidance-scale-4.0"."""
        words = [self.keeping.stem(config.prompt), str(config.seed)]
        words += [f"{name}-{value}" for name, value in values.items() if name != "seed"]
        return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word.replace("_", "-")) for word in words)

    def run(self, load: Callable[[], Pipeline]) -> int:
        """Make what is missing; returns the exit code."""
        with ExitStack() as held:
            manifest = None
            if self.many:
                held.enter_context(locked(self.folder / BATCH))
                manifest = Manifest(self.folder)
                self._check_pages(manifest)
            wanted = self.wanted(manifest)
            missing = [want for want in wanted if not self._is_done(want, manifest)]
            if manifest is None:
                held.enter_context(locked(wanted[0].outputs.video))
                held.enter_context(locked(wanted[0].work.folder))
            for want in missing:
                try:
                    want.outputs.check()
                except InputError as error:
                    want.item.raise_as(error)
            if missing and (preview := self._preview(missing[0])):
                check_output(preview, overwrite=self.keeping.overwrite or self.resume or bool(manifest and manifest.videos))
            if manifest:
                manifest.begin({want.name: want.key for want in missing})
            failed = self._make(missing, manifest, load) if missing else {}
            if isinstance(failed, int):
                return failed
            return self._finish(wanted, missing, failed, manifest)

    def _is_done(self, want: Wanted, manifest: Manifest | None) -> bool:
        """Whether the video stands there already, as this very request makes it; alone, it is looked for with --resume only."""
        if manifest:
            return manifest.is_done(want.name, want.key)
        return self.resume and is_written_as(want.outputs.video, want.key)

    def _check_pages(self, manifest: Manifest) -> None:
        if self.is_sweep and not manifest.pages:
            for name in (INDEX_PAGE, SHEET):
                check_output(self.folder / name, overwrite=self.keeping.overwrite)
            manifest.pages = True

    def _make(self, missing: Sequence[Wanted], manifest: Manifest | None, load: Callable[[], Pipeline]) -> dict[str, str] | int:
        """What failed, by name of the video; or the exit code of a run that was stopped."""
        for stage in self.spec.components.values():
            self.checkpoint.require(stage)  # after all that is free to check: this may fetch
        if pack := self.options.get("pack"):
            pack.require_trust()
        work, finished = None, False
        try:
            with stoppable() as cancel:
                pipe = load()
                from tpuvid.batch import Batch  # after what says that it starts: jax and torch come with it

                pipe.verify()
                configs = [pipe.resolve(want.config) for want in missing]
                for config in configs:
                    pipe.check_pack(config)
                work = replace(missing[0].work, origin=self.origin() | self._of_run(pipe))
                if not self.many:
                    if work.holds_latents() and not self.resume:
                        click.echo(
                            "tpuvid: something of this video is kept from an earlier run; --resume would go on there", err=True
                        )
                    work.begin(missing[0].outputs.video, configs[0].seed)
                jobs = [self._job(want, config, manifest) for want, config in zip(missing, configs, strict=True)]
                control = self._control(cancel, work, missing)
                resume = self.resume or self.many
                batch = Batch(
                    pipe=pipe,
                    work=work,
                    jobs=jobs,
                    batch_size=self.batch_size,
                    resume=resume,
                    alone=not self.many,
                    control=control,
                )
                failed = batch.run()
                finished = True
        except (KeyboardInterrupt, Cancelled) as error:
            self._say_stopped(error, work)
            return exit_code(cancel, error)
        except Exception as error:
            if work is None or not work.holds_latents() or os.environ.get(DEBUG_VARIABLE):
                raise
            kind = InputError if isinstance(error, InputError) else TpuvidError  # the exit code stays
            raise kind(f"{_reason(error)} ({self._how_to_go_on()})") from error
        finally:
            if work and not self.many and not finished and not work.holds_latents():
                work.drop(work.folder)  # there is nothing in it that took long
        return {missing[i].name: _reason(error) for i, error in failed.items()}

    @staticmethod
    def _of_run(pipe: Pipeline) -> dict[str, Any]:
        """What latents depend on, and is known once the model is there."""
        return {"revision": pipe.revision(), "dtype": pipe.runtime.dtype.name}

    def _control(self, cancel: CancelToken, work: Work, missing: Sequence[Wanted]) -> Control:
        return Control(
            cancel=cancel,
            checkpoint_dir=work.folder,
            checkpoint_every=self.checkpoint_every,
            resume=self.resume or self.many,
            preview=self._preview(missing[0]),
            preview_every=self.preview_every or 1,
        )

    def _preview(self, want: Wanted) -> Path | None:
        if self.preview_every is None:
            return None
        return want.outputs.video.with_name(f"{'batch' if self.many else want.outputs.video.stem}.preview.png")

    def _job(self, want: Wanted, config: GenerationConfig, manifest: Manifest | None) -> Job:
        from tpuvid.batch import Job

        def on_ready(sha256: str) -> None:
            if manifest:
                manifest.note(want.name, want.key, state="done", seed=config.seed, sha256=sha256)

        def on_done(written: Written) -> None:
            if self.many:
                click.echo(f"video: {want.outputs.video} (seed {config.seed})")
                return
            say_written(want.outputs, written)
            click.echo(f"seed: {config.seed}")
            say_how(written.record["history"])

        return Job(config=config, outputs=want.outputs, on_ready=on_ready, on_done=on_done)

    def _finish(
        self, wanted: Sequence[Wanted], missing: Sequence[Wanted], failed: Mapping[str, str], manifest: Manifest | None
    ) -> int:
        """The summary of many, the pages of a sweep, and the exit code."""
        if preview := self._preview(wanted[0]):
            preview.unlink(missing_ok=True)
        if manifest is None:
            (want,) = wanted
            want.work.drop(want.work.folder)
            if not missing:
                click.echo(f"video: {want.outputs.video} (there already)")
            return 0
        for want in missing:
            if error := failed.get(want.name):
                manifest.note(want.name, want.key, state="failed", seed=want.config.seed, error=error)
                where = f"{want.item.where}: " if want.item.where else ""
                click.echo(f"tpuvid: error: {where}{want.config.prompt!r}: {error}", err=True)
        if manifest.all_done():
            wanted[0].work.drop(wanted[0].work.folder)
        if self.is_sweep:
            for name, path in write_pages(self.folder, self._cells(wanted, failed)).items():
                click.echo(f"{name}: {path}")
        there = len(wanted) - len(missing)
        click.echo(f"videos: {len(missing) - len(failed)} made, {there} there already, {len(failed)} failed; in {self.folder}")
        if failed:
            click.echo("the same command tries again what failed, and only that", err=True)
        return EXIT_SOME_FAILED if failed else 0

    def _cells(self, wanted: Sequence[Wanted], failed: Mapping[str, str]) -> list[Cell]:
        prompts = list(dict.fromkeys(want.config.prompt for want in wanted))
        shown = {p: p if self.keeping.prompt_in_metadata else f"prompt {i + 1}" for i, p in enumerate(prompts)}
        return [
            Cell(shown[want.config.prompt], want.item.swept, None if want.name in failed else want.outputs.video)
            for want in wanted
        ]

    def _say_stopped(self, error: BaseException, work: Work | None) -> None:
        kept = work and (self.many or work.holds_latents())
        at = f"stopped after step {error.done} of {error.total}" if isinstance(error, Cancelled) else "interrupted"
        click.echo(f"tpuvid: {at}; {self._how_to_go_on() if kept else 'nothing is kept'}", err=True)

    def _how_to_go_on(self) -> str:
        """What goes on where this run ended."""
        if self.many:
            return "what is done is kept; the same command goes on"
        return "what is done is kept; the same command with --resume goes on"


def plan_generation(
    model: str,
    *,
    prompt: str | None,
    prompts: str | None,
    num_videos: int,
    sweep: Sequence[str],
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    keeping: Keeping,
    **how: Any,
) -> Generation:
    """The request that flags make; raises `InputError` for those that don't go together. `how`: fields of `Generation`."""
    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt or --prompts")
    if keeping.output and keeping.output_dir:
        raise InputError(f"give either --output={keeping.output} or --output-dir={keeping.output_dir}")
    axes = parse_sweep(sweep)
    spec, checkpoint = resolve_model(model, decoder=options["decoder"])
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
        keeping = replace(keeping, output_dir=OUTPUTS / f"{keeping.stem(items[0].settings['prompt'])}_sweep")
    return Generation(
        model=model, spec=spec, checkpoint=checkpoint, options=options, keeping=keeping, items=items, settings=settings,
        many=many, **how,
    )  # fmt: skip


def say_written(outputs: Outputs, written: Written) -> None:
    for name, path in outputs.files.items():
        click.echo(f"{name}: {path}")
    asked = written.record["num_frames"]
    if written.frames != asked:
        click.echo(f"frames: {written.frames}; {asked} were asked for, and this VAE makes {written.frames} of as many latents")


def say_how(history: History, *stages: str) -> None:
    """What the window showed, which steps the cache served, where the profile is, and what came out of the pack."""
    about = history.get("denoise", {}) if not stages or "denoise" in stages else {}
    if resumed := about.get("resumed"):
        click.echo(f"resumed: {resumed}")
    if window := about.get("window"):
        click.echo(f"window: a token sees {window}")
    if cache := about.get("cache"):
        click.echo(f"cache: {cache['name']}: full steps {cache['full']}; cached steps {cache['cached']}")
    if profile := about.get("profile"):
        click.echo(f"profile: {profile} (*.xplane.pb for XProf, perfetto_trace.json.gz for Perfetto)")
    for note in ("loaded from pack", "compiled beside the pack"):
        if programs := [history[stage][note] for stage in stages or history if note in history[stage]]:
            click.echo(f"{note}: {'; '.join(programs)}")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TpuvidError) else unexpected(error)
