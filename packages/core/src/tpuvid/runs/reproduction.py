"""``tpuvid reproduce``: a video made again from the record that it carries, and how far the new one is from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpuvid.contract.models import ModelSpec
from tpuvid.contract.options import RECORDED, Options
from tpuvid.contract.settings import SETTINGS, GenerationConfig
from tpuvid.errors import InputError
from tpuvid.files.checkpoint import Checkpoint
from tpuvid.files.lora import read_loras
from tpuvid.files.versions import versions
from tpuvid.plugin.lookup import resolve_model
from tpuvid.plugin.registry import registry
from tpuvid.runs.compare import Comparison, compare
from tpuvid.runs.kept.record import read_record
from tpuvid.runs.outputs import Outputs

if TYPE_CHECKING:
    from tpuvid.runs.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference in what the video was made with."""

    what: str
    then: str | None
    now: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.then or 'not known'} then, {self.now or 'none'} now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    video: Path
    differences: tuple[Difference, ...]
    same_latents: bool
    """Whether the latents are the same, bit for bit."""
    same_frames: bool
    """Whether the frames were the same before they were compressed."""
    comparison: Comparison | None
    """The comparison with the original mp4; None where only its record is there."""

    def to_dict(self) -> dict[str, Any]:
        """The reproduction, JSON-ready."""
        return {
            "video": str(self.video),
            "differences": [asdict(difference) for difference in self.differences],
            "same_latents": self.same_latents,
            "same_frames": self.same_frames,
            "comparison": self.comparison and self.comparison.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A video's record, found to be one that can be run here."""

    path: Path
    record: Mapping[str, Any]
    model: str
    spec: ModelSpec
    checkpoint: Checkpoint
    config: GenerationConfig
    options: Options

    @classmethod
    def read(cls, path: Path, *, model: str | None = None, prompts: Mapping[str, str | None] = {}) -> Recorded:
        """`model` and `prompts` stand in for those of the record.

        Raises `InputError` for a video without a record, for one whose prompt was left out, and for what can't run here.
        """
        record = read_record(path)
        settings = {name: record[name] for name in SETTINGS if name in record}
        settings |= {name: text for name, text in prompts.items() if text is not None}
        if "prompt" not in settings:
            raise InputError(f"{path}: its record leaves out the prompts (--no-prompt-in-metadata); give --prompt")
        if not _well_formed(record):
            raise InputError(f"{path}: its record is incomplete; take the .json beside it, or another copy")
        options, loras = record["options"], record["loras"]
        name = model or record["model_id"]
        try:
            spec, checkpoint = resolve_model(name, decoder=options.get("decoder"))
        except InputError as error:
            raise InputError(f"{path}: was made by {name}, which can't be had here ({error}); pass --model") from None
        if len(loras) > 1:
            raise InputError(f"{path}: its record names {len(loras)} LoRAs, and tpuvid merges one; make it again by hand")
        given = Options(**{name: options[name] for name in RECORDED if options.get(name) is not None})
        if loras:
            given = replace(given, lora_path=loras[0]["path"], lora_scale=loras[0]["scale"])
        config = spec.configure(**settings)
        if config.seed < 0:
            raise InputError(f"{path}: its record says no seed; take the .json beside it, or another copy")
        return cls(path=path, record=record, model=name, spec=spec, checkpoint=checkpoint, config=config, options=given)

    def differences(self) -> list[Difference]:
        """The differences in versions and weights, found before anything is loaded."""
        then = self.record.get("versions", {})
        now = versions(*registry().packages_of(self.spec))
        found = [(name, then.get(name), now.get(name)) for name in sorted({*then, *now})]
        found.append(("weights", self.record.get("fingerprint"), self.checkpoint.fingerprint()))
        then_others, now_others = self.record.get("others", {}), self.checkpoint.others_record()
        found += [(f"weights of {name}", then_others.get(name), now) for name, now in now_others.items()]
        for lora in read_loras(self.options.lora_path, self.options.lora_scale):
            found.append((f"LoRA {lora.path}", self.record["loras"][0].get("sha256"), lora.sha256()))
        return _differing(found)

    def run(self, load: Callable[[], Pipeline], outputs: Outputs) -> Reproduction:
        """Make the video again, into `outputs`."""
        before = self.differences()
        for stage in self.spec.components.values():
            self.checkpoint.require(stage)
        pipe = load()
        pipe.verify()
        config = pipe.resolve(self.config)
        latents = pipe.denoise_config(pipe.encode_config(config), config)
        pipe.free()
        record = outputs.write(pipe, latents).record
        original = self.path.with_suffix(".mp4")
        return Reproduction(
            video=outputs.video,
            differences=(*before, *self._differences_of_run(record)),
            same_latents=latents.sha256() == self.record.get("latents_sha256"),
            same_frames=record["frames_sha256"] == self.record.get("frames_sha256"),
            comparison=compare(original, outputs.video) if original.is_file() else None,
        )

    def _differences_of_run(self, record: Mapping[str, Any]) -> list[Difference]:
        """The differences known once it has run: the commit of the Hub, devices and layout."""
        then, now = self.record.get("history", {}), record["history"]
        found = [("revision", self.record.get("revision"), record["revision"])]
        for stage in now:
            found.append((f"devices of {stage}", then.get(stage, {}).get("devices"), now[stage].get("devices")))
        return _differing(found)


def _well_formed(record: Mapping[str, Any]) -> bool:
    """Whether everything that is read of a record is of the kind that it should be: a stranger may have written it."""
    options, loras, history, found = (record.get(name) for name in ("options", "loras", "history", "versions"))
    return (
        isinstance(record.get("model_id"), str)
        and isinstance(options, dict)
        and all(isinstance(options.get(name), (*each.types, type(None))) for name, each in RECORDED.items())
        and isinstance(loras, list)
        and all(isinstance(lora, dict) and isinstance(lora.get("path"), str) and "scale" in lora for lora in loras)
        and not any("\0" in lora["path"] for lora in loras)
        and isinstance(history, dict)
        and all(isinstance(stage, dict) for stage in history.values())
        and isinstance(record.get("others", {}), dict)
        and isinstance(found, dict)
        and all(isinstance(version, str) for version in found.values())
    )


def _differing(found: list[tuple[str, Any, Any]]) -> list[Difference]:
    return [Difference(what=what, then=then, now=now) for what, then, now in found if then != now]


def render(found: Reproduction) -> str:
    """What was found, for people."""
    lines = [f"differs: {difference}" for difference in found.differences] or [
        "differs: nothing in versions, weights or devices"
    ]
    lines.append(f"latents: {'identical, bit for bit' if found.same_latents else 'different'}")
    lines.append(f"frames: {'identical' if found.same_frames else 'different'} (before they were compressed)")
    if found.comparison:
        psnr = "infinite: every pixel is the same" if found.comparison.identical else f"{found.comparison.psnr:.2f} dB"
        lines.append(f"PSNR of the mp4 against the original: {psnr}")
    return "\n".join(lines)
