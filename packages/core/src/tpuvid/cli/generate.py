"""``tpuvid generate``: over what is there already, to the videos of a request, and what became of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpuvid.cli.saying import say_how, say_written
from tpuvid.cli.stopping import exit_code, stoppable
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import DEBUG_VARIABLE, InputError, TpuvidError, unexpected
from tpuvid.files.atomic import check_output
from tpuvid.files.locks import locked
from tpuvid.runs.asked.requests import Generation, Wanted
from tpuvid.runs.asked.sweep import INDEX_PAGE, SHEET, Cell, write_pages
from tpuvid.runs.control import Cancelled, CancelToken, Control
from tpuvid.runs.kept.record import is_written_as
from tpuvid.runs.kept.work import BATCH, Manifest, Work
from tpuvid.runs.outputs import Written

if TYPE_CHECKING:
    from tpuvid.runs.batch import Job
    from tpuvid.runs.pipeline import Pipeline

EXIT_SOME_FAILED = 3


@dataclass(frozen=True, kw_only=True)
class Generating:
    """A request at work."""

    request: Generation
    load: Callable[[], Pipeline]

    def run(self) -> int:
        """Make what is missing; returns the exit code."""
        with ExitStack() as held:
            manifest = None
            if self.request.many:
                held.enter_context(locked(self.request.folder / BATCH))
                manifest = Manifest(self.request.folder)
                self._check_pages(manifest)
            wanted = self.request.wanted(manifest)
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
                check_output(
                    preview,
                    overwrite=self.request.keeping.overwrite or self.request.resume or bool(manifest and manifest.videos),
                )
            if manifest:
                manifest.begin({want.name: want.key for want in missing})
            failed = self._make(missing, manifest) if missing else {}
            if isinstance(failed, int):
                return failed
            return self._finish(wanted, missing, failed, manifest)

    def _is_done(self, want: Wanted, manifest: Manifest | None) -> bool:
        """Whether the video stands there already, as this very request makes it; alone, it is looked for with --resume only."""
        if manifest:
            return manifest.is_done(want.name, want.key)
        return self.request.resume and is_written_as(want.outputs.video, want.key)

    def _check_pages(self, manifest: Manifest) -> None:
        if self.request.is_sweep and not manifest.pages:
            for name in (INDEX_PAGE, SHEET):
                check_output(self.request.folder / name, overwrite=self.request.keeping.overwrite)
            manifest.pages = True

    def _make(self, missing: Sequence[Wanted], manifest: Manifest | None) -> dict[str, str] | int:
        """What failed, by name of the video; or the exit code of a run that was stopped."""
        for stage in self.request.spec.components.values():
            self.request.checkpoint.require(stage)  # after all that is free to check: this may fetch
        if pack := self.request.options.pack:
            pack.require_trust()
        work, finished = None, False
        try:
            with stoppable() as cancel:
                pipe = self.load()
                from tpuvid.runs.batch import Batch  # after what says that it starts: jax and torch come with it

                pipe.verify()
                configs = [pipe.resolve(want.config) for want in missing]
                for config in configs:
                    pipe.check_pack(config)
                work = replace(missing[0].work, identity=pipe.identity())
                if not self.request.many:
                    if work.holds_latents() and not self.request.resume:
                        click.echo(
                            "tpuvid: something of this video is kept from an earlier run; --resume would go on there", err=True
                        )
                    work.begin(missing[0].outputs.video, configs[0].seed)
                jobs = [self._job(want, config, manifest) for want, config in zip(missing, configs, strict=True)]
                control = self._control(cancel, work, missing)
                batch = Batch(
                    pipe=pipe,
                    work=work,
                    jobs=jobs,
                    batch_size=self.request.batch_size,
                    resume=self.request.goes_on,
                    alone=not self.request.many,
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
            if work and not self.request.many and not finished and not work.holds_latents():
                work.drop(work.folder)  # there is nothing in it that took long
        return {missing[i].name: _reason(error) for i, error in failed.items()}

    def _control(self, cancel: CancelToken, work: Work, missing: Sequence[Wanted]) -> Control:
        return Control(
            cancel=cancel,
            savepoint_dir=work.folder,
            savepoint_every=self.request.savepoint_every,
            resume=self.request.goes_on,
            preview=self._preview(missing[0]),
            preview_every=self.request.preview_every or 1,
        )

    def _preview(self, want: Wanted) -> Path | None:
        if self.request.preview_every is None:
            return None
        return want.outputs.video.with_name(f"{'batch' if self.request.many else want.outputs.video.stem}.preview.png")

    def _job(self, want: Wanted, config: GenerationConfig, manifest: Manifest | None) -> Job:
        from tpuvid.runs.batch import Job

        def on_ready(sha256: str) -> None:
            if manifest:
                manifest.note(want.name, want.key, state="done", seed=config.seed, sha256=sha256)

        def on_done(written: Written) -> None:
            if self.request.many:
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
                said = error if self.request.keeping.prompt_in_metadata else "not kept, since it may say the prompts"
                manifest.note(want.name, want.key, state="failed", seed=want.config.seed, error=said)
                where = f"{want.item.where}: " if want.item.where else ""
                click.echo(f"tpuvid: error: {where}{want.config.prompt!r}: {error}", err=True)
        if manifest.all_done():
            wanted[0].work.drop(wanted[0].work.folder)
        if self.request.is_sweep:
            for name, path in write_pages(self.request.folder, self._cells(wanted, failed)).items():
                click.echo(f"{name}: {path}")
        there = len(wanted) - len(missing)
        click.echo(
            f"videos: {len(missing) - len(failed)} made, {there} there already, {len(failed)} failed; in {self.request.folder}"
        )
        if failed:
            click.echo("the same command tries again what failed, and only that", err=True)
        return EXIT_SOME_FAILED if failed else 0

    def _cells(self, wanted: Sequence[Wanted], failed: Mapping[str, str]) -> list[Cell]:
        prompts = list(dict.fromkeys(want.config.prompt for want in wanted))
        shown = {p: p if self.request.keeping.prompt_in_metadata else f"prompt {i + 1}" for i, p in enumerate(prompts)}
        return [
            Cell(shown[want.config.prompt], want.item.swept, None if want.name in failed else want.outputs.video)
            for want in wanted
        ]

    def _say_stopped(self, error: BaseException, work: Work | None) -> None:
        kept = work and (self.request.many or work.holds_latents())
        at = f"stopped after step {error.done} of {error.total}" if isinstance(error, Cancelled) else "interrupted"
        click.echo(f"tpuvid: {at}; {self._how_to_go_on() if kept else 'nothing is kept'}", err=True)

    def _how_to_go_on(self) -> str:
        """What goes on where this run ended."""
        if self.request.many:
            return "what is done is kept; the same command goes on"
        return "what is done is kept; the same command with --resume goes on"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TpuvidError) else unexpected(error)
