"""The files that a video is written to, all of them or none, while it is decoded. Imports neither jax nor torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpuvid.compute.progress import current
from tpuvid.errors import TpuvidError
from tpuvid.files.atomic import atomic_path, check_output
from tpuvid.files.digests import file_sha256, sealed
from tpuvid.files.stage_files import FRAMES, FramesWriter, private, said_in_files
from tpuvid.runs.kept.record import make_record

if TYPE_CHECKING:
    from tpuvid.contract.values import Latents
    from tpuvid.runs.pipeline import Pipeline


class Written(NamedTuple):
    record: dict[str, Any]
    """See `tpuvid.runs.kept.record`."""
    frames: int


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files that are written of one video."""

    video: Path
    request: str | None = None
    """The key in the record, by which a later run knows the video again."""
    overwrite: bool = False
    save_frames: bool = False
    metadata: bool = True
    prompt_in_metadata: bool = True

    @property
    def files(self) -> dict[str, Path]:
        """The mp4 is first, and is written last: where it is, the others are too."""
        files = {"video": self.video, "contact sheet": self.video.with_suffix(".png")}
        files |= {"settings": self.video.with_suffix(".json")} if self.metadata else {}
        return files | ({"frames": self.video.with_name(FRAMES)} if self.save_frames else {})

    def check(self) -> None:
        """Raise `InputError` unless all of them can be written."""
        from tpuvid.files.mp4 import check_mp4_name

        check_mp4_name(self.video)
        for path in self.files.values():
            check_output(path, overwrite=self.overwrite)

    def write(
        self,
        pipe: Pipeline,
        latents: Latents,
        *,
        on_chunk: Callable[[], None] = lambda: None,
        on_ready: Callable[[str], None] = lambda sha256: None,
    ) -> Written:
        """Decode `latents` into the files, chunk by chunk, with a call after each; `on_ready` is given the mp4's hash before
        the file gets its name."""
        from tpuvid.files.mp4 import Mp4Writer, set_metadata
        from tpuvid.files.sheet import ContactSheet

        latents = latents if self.prompt_in_metadata else private(latents)
        sheet = ContactSheet()
        with ExitStack() as stack:  # left in reverse order
            temporary = {n: stack.enter_context(atomic_path(p, overwrite=self.overwrite)) for n, p in self.files.items()}
            with ExitStack() as writers:
                video = writers.enter_context(Mp4Writer(temporary["video"], fps=latents.config.fps))
                frames = None
                if self.save_frames:
                    frames = writers.enter_context(FramesWriter(temporary["frames"], said_in_files(latents)))
                report, asked = None, latents.config.num_frames
                for chunk in pipe.decode_chunks(latents):
                    if unknown := sorted(set(chunk) - {"frames"}):
                        raise TpuvidError(f"the decoder makes {', '.join(unknown)} too, which no file here can hold")
                    drawn = chunk["frames"]
                    if report is None:  # the decoder is loaded, and most of it compiled
                        steps = current().steps("decode", asked, min(drawn.shape[1], asked), unit="frame", counted_as="write")
                        report = writers.enter_context(steps)
                    video.write(drawn[0])
                    sheet.add(drawn[0])
                    if frames:
                        frames.write(drawn)
                    report(min(video.frames, asked))  # some VAEs make a few more
                    on_chunk()
            shape = 1, video.frames, *drawn.shape[2:]
            config, history = pipe.decoded(latents, shape)
            record = make_record(
                pipe,
                latents,
                config,
                history,
                frames_sha256=video.sha256,
                request=self.request,
                with_prompt=latents.prompts_sha256 is None,
            )
            sheet.save(temporary["contact sheet"])
            if self.metadata:
                set_metadata(temporary["video"], record)
            digest = file_sha256(temporary["video"])
            if self.metadata:
                beside = sealed({n: v for n, v in record.items() if n != "checksum"} | {"video_sha256": digest})
                temporary["settings"].write_text(json.dumps(beside, indent=2, ensure_ascii=False) + "\n", "utf-8")
            on_ready(digest)
        return Written(record, video.frames)
