"""Carrying out a request: over what is there already, to the videos that are missing. What happens is told as events, and what
has become of the request is an `Outcome`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpuvid.compute.progress import Progress
from tpuvid.contract.events import Emit, Noticed, Outcome, Stopped, VideoFailed, VideoMade
from tpuvid.contract.settings import GenerationConfig
from tpuvid.errors import DEBUG_VARIABLE, InputError, TpuvidError, unexpected
from tpuvid.files.atomic import check_output
from tpuvid.files.locks import locked
from tpuvid.runs.asked.requests import Generation, Wanted
from tpuvid.runs.asked.sweep import INDEX_PAGE, SHEET, Cell, write_pages
from tpuvid.runs.control import Cancelled, CancelToken, Control, was_terminated
from tpuvid.runs.kept.record import is_written_as
from tpuvid.runs.kept.work import BATCH, Manifest, Work
from tpuvid.runs.outputs import Written

if TYPE_CHECKING:
    from tpuvid.runs.batch import Job
    from tpuvid.runs.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A request at work. `cancel` stops it; `emit` is told what happens."""

    request: Generation
    load: Callable[[], Pipeline]
    emit: Emit
    cancel: CancelToken

    def run(self) -> Outcome:
        """Make what is missing."""
        with ExitStack() as held:
            held.enter_context(Progress(self.emit).watching())
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
            self._check_outputs(missing, manifest)
            if manifest:
                manifest.begin({want.name: want.key for want in missing})
            failed = self._make(missing, manifest) if missing else {}
            if isinstance(failed, Stopped):
                return Outcome(stopped=failed)
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

    def _check_outputs(self, missing: Sequence[Wanted], manifest: Manifest | None) -> None:
        for want in missing:
            try:
                want.outputs.check()
            except InputError as error:
                want.item.raise_as(error)
        if missing and (preview := self._preview(missing[0])):
            own = self.request.resume or bool(manifest and manifest.videos)
            check_output(preview, overwrite=self.request.keeping.overwrite or own)

    def _make(self, missing: Sequence[Wanted], manifest: Manifest | None) -> dict[str, str] | Stopped:
        """What failed, by name of the video; or where the run was stopped."""
        for stage in self.request.spec.components.values():
            self.request.checkpoint.require(stage)  # after all that is free to check: this may fetch
        if pack := self.request.options.pack:
            pack.require_trust()
        work, finished = None, False
        try:
            pipe = self.load()
            from tpuvid.runs.batch import Batch  # after what says that it starts: jax and torch come with it

            pipe.verify()
            configs = [pipe.resolve(want.config) for want in missing]
            for config in configs:
                pipe.check_pack(config)
            work = replace(missing[0].work, identity=pipe.identity())
            if not self.request.many:
                if work.holds_latents() and not self.request.resume:
                    self.emit(Noticed(text="something of this video is kept from an earlier run; --resume would go on there"))
                work.begin(missing[0].outputs.video, configs[0].seed)
            batch = Batch(
                pipe=pipe,
                work=work,
                jobs=[self._job(want, config, manifest) for want, config in zip(missing, configs, strict=True)],
                batch_size=self.request.batch_size,
                resume=self.request.goes_on,
                alone=not self.request.many,
                control=self._control(work, missing),
            )
            failed = batch.run()
            finished = True
        except (KeyboardInterrupt, Cancelled) as error:
            return self._stopped(error, work)
        except Exception as error:
            if work is None or not work.holds_latents() or os.environ.get(DEBUG_VARIABLE):
                raise
            kind = InputError if isinstance(error, InputError) else TpuvidError  # the exit code stays
            raise kind(f"{_reason(error)} ({self.request.how_to_go_on})") from error
        finally:
            if work and not self.request.many and not finished and not work.holds_latents():
                work.drop(work.folder)  # there is nothing in it that took long
        return {missing[i].name: _reason(error) for i, error in failed.items()}

    def _stopped(self, error: BaseException, work: Work | None) -> Stopped:
        done, total = (error.done, error.total) if isinstance(error, Cancelled) else (None, None)
        kept = work is not None and (self.request.many or work.holds_latents())
        return Stopped(done=done, total=total, kept=kept, terminated=was_terminated(self.cancel, error))

    def _control(self, work: Work, missing: Sequence[Wanted]) -> Control:
        return Control(
            cancel=self.cancel,
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
            self.emit(VideoMade(files=want.outputs.files, seed=config.seed, frames=written.frames, record=written.record))

        return Job(config=config, outputs=want.outputs, on_ready=on_ready, on_done=on_done)

    def _finish(
        self, wanted: Sequence[Wanted], missing: Sequence[Wanted], failed: Mapping[str, str], manifest: Manifest | None
    ) -> Outcome:
        """Note what failed, write the pages of a sweep, and remove what no later run needs."""
        if preview := self._preview(wanted[0]):
            preview.unlink(missing_ok=True)
        work = wanted[0].work
        for want in missing:
            if manifest and (error := failed.get(want.name)):
                said = error if self.request.keeping.prompt_in_metadata else "not kept, since it may say the prompts"
                manifest.note(want.name, want.key, state="failed", seed=want.config.seed, error=said)
                self.emit(
                    VideoFailed(video=want.outputs.video, prompt=want.config.prompt, where=want.item.where or "", error=error)
                )
        if manifest is None or manifest.all_done():
            work.drop(work.folder)
        pages = write_pages(self.request.folder, self._cells(wanted, failed)) if self.request.is_sweep else {}
        there = len(wanted) - len(missing)
        videos = tuple(want.outputs.video for want in wanted)
        return Outcome(made=len(missing) - len(failed), there=there, failed=len(failed), videos=videos, pages=pages)

    def _cells(self, wanted: Sequence[Wanted], failed: Mapping[str, str]) -> list[Cell]:
        prompts = list(dict.fromkeys(want.config.prompt for want in wanted))
        shown = {p: p if self.request.keeping.prompt_in_metadata else f"prompt {i + 1}" for i, p in enumerate(prompts)}
        return [
            Cell(shown[want.config.prompt], want.item.swept, None if want.name in failed else want.outputs.video)
            for want in wanted
        ]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TpuvidError) else unexpected(error)
