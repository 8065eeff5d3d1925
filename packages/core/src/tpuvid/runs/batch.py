"""Videos through the three stages together: all prompts encoded, then all denoised, then all decoded, each stage loaded once.

What a stage leaves is a file before the next begins, so that neither a failure nor a kill loses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tpuvid.compute.progress import current
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.values import Conditioning, Latents
from tpuvid.errors import InputError, TpuvidError
from tpuvid.runs.control import Cancelled, Control, raise_if_stopped
from tpuvid.runs.kept.work import Work
from tpuvid.runs.outputs import Outputs, Written
from tpuvid.runs.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video. `on_ready` is given the mp4's hash just before the file gets its name, `on_done` what was written."""

    config: GenerationConfig
    """Resolved: see `Pipeline.resolve`."""
    outputs: Outputs
    on_ready: Callable[[str], None] = lambda sha256: None
    on_done: Callable[[Written], None] = lambda written: None


class NotKept(TpuvidError):
    """Latents that are there, and for which there is no room."""


@dataclass(kw_only=True)
class Batch:
    """Jobs over one pipeline."""

    pipe: Pipeline
    work: Work
    jobs: Sequence[Job]
    batch_size: int = 1
    """Videos that one denoising step computes, where they differ only in prompts and seeds."""
    resume: bool = False
    """Take what `work` has of them."""
    alone: bool = False
    """A failure is raised, not noted."""
    control: Control = field(default_factory=Control)
    failed: dict[int, Exception] = field(default_factory=dict)
    """What failed, by number of the job."""

    def run(self) -> dict[int, Exception]:
        """What failed, by number of the job. Raises `KeyboardInterrupt`, between two parts of the work, once cancelled."""
        missing = [i for i, job in enumerate(self.jobs) if not (self.resume and self.work.load_latents(job.config))]
        if missing:
            self.pipe.read_ahead()
        self._encode(missing)
        self.pipe.free()
        groups = list(self._groups(missing))
        for place, group in enumerate(groups):
            current().reach("denoising", place + 1, len(groups))
            try:
                self._denoise(group)
            except NotKept:
                if self.alone:
                    raise
        self.pipe.free()
        for i in range(len(self.jobs)):
            current().reach("decoding", i + 1, len(self.jobs))
            self._try([i], self._decode)
        return self.failed

    def _try(self, numbers: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        """Do `work` for the jobs that have not failed yet; what stops it is theirs alone."""
        raise_if_stopped(self.control.cancel)
        numbers = [i for i in numbers if i not in self.failed]
        if not numbers:
            return
        try:
            work(numbers)
        except (Cancelled, NotKept):
            raise
        except Exception as error:
            if self.alone:
                raise
            self.failed |= dict.fromkeys(numbers, error)

    def _encode(self, numbers: Sequence[int]) -> None:
        """Encode every prompt once, whatever the number of its videos."""
        same: dict[Path, list[int]] = {}
        for i in numbers:
            same.setdefault(self.work.embeddings(self.jobs[i].config), []).append(i)
        for place, alike in enumerate(same.values()):
            current().reach("encoding", place + 1, len(same))
            self._try(alike, self._encode_one)

    def _encode_one(self, alike: Sequence[int]) -> None:
        config = self.jobs[alike[0]].config
        if not (self.resume and self.work.load_embeddings(config)):
            self.work.save_embeddings(config, self.pipe.encode_config(config))

    def _groups(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Jobs that one run of the loop can make, by shapes first: so that a program is compiled, and then used to the end."""
        same: dict[GenerationConfig, list[int]] = {}
        for i in numbers:
            same.setdefault(self.jobs[i].config.batch_key(), []).append(i)
        for alike in same.values():
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _denoise(self, group: Sequence[int]) -> None:
        """Denoise in one batch; where that fails, one by one."""
        group = [i for i in group if i not in self.failed]
        if len(group) < 2:
            self._try(group, self._denoise_together)
            return
        raise_if_stopped(self.control.cancel)
        try:
            self._denoise_together(group)
        except (Cancelled, NotKept):
            raise
        except Exception as error:
            current().notice(f"a batch of {len(group)} failed ({error}); its videos are made one by one")
            for i in group:
                self._try([i], self._denoise_together)

    def _denoise_together(self, group: Sequence[int]) -> None:
        configs = [self.jobs[i].config for i in group]
        control = replace(self.control, on_result=lambda found: self._keep(group, found))
        self.pipe.denoise_batch([self._conditioning(config) for config in configs], configs, control=control)

    def _conditioning(self, config: GenerationConfig) -> Conditioning:
        found = self.work.load_embeddings(config)
        if found is None:
            raise InputError(f"{self.work.embeddings(config)}: the embeddings are gone; run the command again")
        return found

    def _keep(self, group: Sequence[int], found: Sequence[Latents]) -> None:
        """Raises `NotKept` where a file can't be written, so that the savepoints stay."""
        unsaved = {}
        for i, latents in zip(group, found, strict=True):
            config = self.jobs[i].config
            try:
                latents.check()
            except TpuvidError as error:
                if self.alone:
                    raise
                self.failed[i] = error
                continue
            try:
                self.work.save_latents(config, latents)
            except TpuvidError as error:
                unsaved[i] = error
        if unsaved:
            self.failed |= unsaved
            raise NotKept(str(next(iter(unsaved.values()))))

    def _decode(self, numbers: Sequence[int]) -> None:
        job = self.jobs[numbers[0]]
        latents = self.work.load_latents(job.config)
        if latents is None:
            raise InputError(f"{self.work.latents(job.config)}: the latents are gone; run the command again")
        go_on = partial(raise_if_stopped, self.control.cancel)
        written = job.outputs.write(self.pipe, latents, on_chunk=go_on, on_ready=job.on_ready)
        job.on_done(written)
        self.work.drop(self.work.latents(job.config))
