"""The conformance suite: what holds for every model of tpuvid. Each check is a function that says what it saw, or raises.

`AssertionError` says what is wrong, `NothingToCheck` why there is nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from tpuvid.compute.runtime import Runtime, enable_compilation_cache
from tpuvid.contract.models import ModelSpec, imported
from tpuvid.contract.settings import OPTIONAL_SETTINGS, SETTINGS, GenerationConfig
from tpuvid.contract.values import Conditioning, Latents
from tpuvid.errors import InputError, TpuvidError
from tpuvid.files.checkpoint import ConfigsOnly
from tpuvid.files.mp4 import video_size
from tpuvid.files.stage_files import load_conditioning, load_latents, save_conditioning, save_latents
from tpuvid.files.weights import Weights, weight_files
from tpuvid.plugin.loader import said
from tpuvid.plugin.lookup import resolve_model
from tpuvid.plugin.registry import registry
from tpuvid.runs.control import Cancelled, CancelToken, Control
from tpuvid.runs.kept.record import read_record
from tpuvid.runs.outputs import Outputs
from tpuvid.runs.pipeline import Pipeline
from tpuvid.runs.video import Video
from tpuvid.testing.subject import NEGATIVE_PROMPT, OTHER_PROMPT, PROMPT, Subject

HEAVY = ("jax", "torch", "torchax", "diffusers", "transformers")
CLOSE = 1e-4
"""The error that is allowed, relative to the largest value: float32 sums in another order differ by some 1e-6, another
computation by far more."""
METHODS = {
    "text_encoder": ("verify", "load", "encode"),
    "denoiser": ("verify", "load", "resolve", "check", "denoise"),
    "decoder": ("verify", "load", "check", "decode"),
}
"""The methods of each stage's protocol in `tpuvid.contract.stages`."""
MESHES = (None, "dp=2,tp=4", "sp=8", "dp=2,sp=4,fsdp")
"""None: what eight devices get by themselves."""


class NothingToCheck(Exception):
    pass


def run(argument: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The job of `tpuvid.testing.check`: it yields each result as it comes."""
    enable_compilation_cache()
    specs = [registry().get(name) for name in argument["models"]]
    checkpoint = argument["checkpoint"]
    subject = Subject(specs, Path(checkpoint) if checkpoint else None, Path(argument["folder"]))
    going = True
    for check in SUITE:
        yield {"begins": _name(check)}
        result = _result(check, subject) if going else {"check": _name(check), "passed": None, "detail": "not run"}
        going = going and not (check in FIRST and result["passed"] is False)
        yield result


def _result(check: Callable[[Subject], str], subject: Subject) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        passed, detail = True, check(subject)
    except NothingToCheck as error:
        passed, detail = None, str(error)
    except BaseException as error:  # whatever the plugin's code raises is what its author needs to read
        plain = isinstance(error, AssertionError | TpuvidError) and str(error)
        passed, detail = False, str(error) if plain else f"{said(error)} ({_where(error)})"
    seconds = round(time.perf_counter() - start, 2)
    return {"check": _name(check), "passed": passed, "detail": " ".join(detail.split())[:500], "seconds": seconds}


def _name(check: Callable[[Subject], str]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def _where(error: BaseException) -> str:
    """The innermost lines of code."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " → ".join(frames[-3:])


# The checks, in their order on the sheet


def check_spec(subject: Subject) -> str:
    """Complete: its loaders exist, its configs too, and what breaks a rule is refused with the value and the rule."""
    for spec in subject.specs:
        config = spec.configure(prompt=PROMPT)
        for stage, methods in METHODS.items():
            loader = getattr(spec, f"load_{stage}")
            assert callable(made_by := imported(loader)), f"{loader} is not callable"
            missing = [method for method in methods if isinstance(made_by, type) and not hasattr(made_by, method)]
            assert not missing, f"{loader} has no {', '.join(missing)}: see tpuvid.contract.stages"
        if spec.conformance is not None:
            spec.configure(prompt=PROMPT, **spec.conformance.settings)
            for name in filter(None, (spec.conformance.random_checkpoint, spec.conformance.reference)):
                assert callable(imported(name)), f"{name} is not callable"
        for name, wrong in _wrong_settings(spec, config):
            with _refused(f"{name}={wrong!r}"[:60], containing=f"{name}={wrong}"):
                spec.configure(prompt=PROMPT, **{name: wrong})
        if spec.configs is not None:
            package, _, folder = spec.configs.partition(":")
            configs = ConfigsOnly(spec.model_id, folder=Path(str(files(package))) / folder, place=lambda *_: None)
            configs.require(sum(spec.components.values(), ()))
    planned = sum(spec.configs is not None for spec in subject.specs)
    return f"{len(subject.specs)} model(s), {planned} with configs for tpuvid plan; refuses what breaks their rules"


def _wrong_settings(spec: ModelSpec, config: GenerationConfig) -> Iterator[tuple[str, Any]]:
    yield from (("num_frames", 0), ("num_inference_steps", 0), ("guidance_scale", float("nan")), ("fps", 0))
    yield "width", spec.rules.max_size + spec.rules.size_multiple
    if spec.rules.size_multiple > 1:
        yield "height", config.height + 1
    if spec.rules.frame_step > 1:
        yield "num_frames", config.num_frames + 1
    yield from ((name, SETTINGS[name].examples[1]) for name in OPTIONAL_SETTINGS if name not in spec.takes)


def check_light(subject: Subject) -> str:
    """Listing the models imports nothing heavy."""
    script = (
        f"import sys; from tpuvid.plugin.registry import registry; registry().get({subject.spec.model_id!r}); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert done.stdout.strip() == "[]", (
        f"the module of the entry point imports {done.stdout.strip()}; import them in the stages"
    )
    return f"known in {time.perf_counter() - start:.2f} s, without {', '.join(HEAVY[:3])} and the like"


def check_found(subject: Subject) -> str:
    """A checkpoint folder is complete, and is run by this package because of what its files say."""
    subject.pipe.verify()
    spec, _ = resolve_model(str(subject.folder))
    own, found = subject.spec.load_denoiser, spec.load_denoiser
    assert found == own, (
        f"--model FOLDER would run {found}; write a _class_name into model_index.json that no other package has"
    )
    index = json.loads((subject.folder / "model_index.json").read_text())
    return f"a folder whose model_index.json says {index['_class_name']}"


def check_bad_input(subject: Subject) -> str:
    """Refused before the first weight is read."""
    conditioning, latents, pipe = subject.conditioning, subject.latents, subject.pipeline()
    width = {name: np.concatenate([x, x], axis=-1) for name, x in _embeddings(conditioning).items()}
    undefined = {name: np.full_like(x, np.nan) for name, x in _embeddings(conditioning).items()}
    known = replace(conditioning, model_id="")
    positive = {name: x for name, x in conditioning.tensors.items() if not name.startswith("negative_")}
    channels = np.concatenate([latents.latents, latents.latents], axis=1)
    with _weights_unread():
        for what, tensors in (("embeddings of another width", width), ("embeddings of NaN", undefined)):
            with _refused(what):
                pipe.denoise(replace(known, tensors={**conditioning.tensors, **tensors}), **subject.denoising)
        if pipe.spec.configure(**subject.settings).do_classifier_free_guidance:
            with _refused("guidance without a negative prompt's embeddings"):
                pipe.denoise(replace(known, tensors=positive), **subject.denoising)
        for what, array in (("latents of other channels", channels), ("latents of NaN", np.full_like(latents.latents, np.nan))):
            with _refused(what):
                pipe.decode(replace(latents, tensors={**latents.tensors, "latents": array}))
        damaged = 0
        for what, edit in (("missing weights", _drop_half), ("weights of other shapes", _reshape_all)):
            for component in ("transformer", "text_encoder", "vae"):
                if component in sum(subject.spec.components.values(), ()):
                    with _refused(f"{what} of the {component}"):
                        subject.generate(subject.pipeline(_damaged(subject, component, edit)))
                    damaged += 1
    return f"foreign or undefined embeddings and latents; {damaged} damaged checkpoints"


def _embeddings(conditioning: Conditioning) -> dict[str, np.ndarray]:
    """The tensors that a text encoder made."""
    return {name: x for name, x in conditioning.tensors.items() if x.dtype.kind not in "biu" and "mask" not in name}


def _damaged(subject: Subject, component: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of the checkpoint, links but for one file of weights."""
    folder = subject.scratch / f"{component}-{edit.__name__}"
    for source in subject.folder.rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(subject.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    file = weight_files(folder / component)[0]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return folder


def _drop_half(tensors: dict[str, np.ndarray]) -> None:
    """Drop every second tensor, not only one: it might be among those that the model has no use for."""
    for name in sorted(tensors)[::2]:
        del tensors[name]


def _reshape_all(tensors: dict[str, np.ndarray]) -> None:
    tensors |= {name: np.concatenate([x, x]) if x.ndim else x[None] for name, x in tensors.items()}


def check_shapes(subject: Subject) -> str:
    """What passes between the stages has the right shapes, and so has the video."""
    for name, tensor in subject.conditioning.tensors.items():
        assert tensor.shape[0] == 1, f"{name} is {list(tensor.shape)}, not [1, …]"
    assert "prompt_embeds" in subject.conditioning.tensors, "the text encoder gives no prompt_embeds"
    latents, video = subject.latents.latents, subject.video
    assert latents.dtype == np.float32 and latents.ndim == 5, f"latents are {latents.dtype} {list(latents.shape)}"
    config = video.config
    _check_frames(video, config.height, config.width, subject.settings.get("num_frames", config.num_frames))
    assert video.frames.std() > 0, "every pixel is the same"
    embeds = list(subject.conditioning.tensors["prompt_embeds"].shape)
    return f"prompt_embeds {embeds}, latents {list(latents.shape)}, frames {list(video.frames.shape)}"


def _check_frames(video: Video, height: int, width: int, num_frames: int) -> None:
    """The frames have the size that was asked for, and are as many (CogVideoX may make a few more of as many latents)."""
    frames = video.frames
    as_asked = frames.shape[0] == 1 and frames.shape[1] >= num_frames and frames.shape[2:] == (height, width, 3)
    assert as_asked, f"frames are {list(frames.shape)} for {num_frames} of {width}×{height}"
    assert frames.dtype == np.float32 and 0 <= frames.min() and frames.max() <= 1, "frames are not float32 in [0, 1]"


def check_rules(subject: Subject) -> str:
    """The smallest size that they accept runs, and the next one of each kind."""
    rules = subject.spec.rules
    step, multiple = rules.frame_step, rules.size_multiple
    sizes = [(multiple, multiple, 1), (2 * multiple, 3 * multiple, 1 + step)]
    for height, width, num_frames in sizes:
        asked: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        _check_frames(subject.generate(**asked, num_inference_steps=2), **asked)
    return "; ".join(f"{width}×{height}, {frames} frames" for height, width, frames in sizes)


def check_determinism(subject: Subject) -> str:
    """The same request gives the same video, bit for bit; another seed, prompt or scale another one."""
    frames = subject.video.frames
    assert np.array_equal(subject.generate().frames, frames), "the same request gave another video"
    others: dict[str, Any] = {"seed": subject.video.config.seed + 1, "prompt": OTHER_PROMPT}
    if subject.video.config.do_classifier_free_guidance:
        others |= {"guidance_scale": 1.0, "negative_prompt": OTHER_PROMPT}
    for name, value in others.items():
        assert not np.array_equal(subject.generate(**{name: value}).frames, frames), f"{name}={value!r} gave the same video"
    return f"the same twice; others by {', '.join(others)}"


def check_staged(subject: Subject) -> str:
    """Each stage in a pipeline of its own, with nothing between them but files, gives the same video, bit for bit."""
    folder = subject.scratch / "stages"
    path = save_conditioning(folder, subject.conditioning, overwrite=False)
    conditioning = load_conditioning(path)
    for name, tensor in subject.conditioning.tensors.items():
        assert np.array_equal(conditioning.tensors[name], tensor), f"{name} came back otherwise from its file"
    path = save_latents(folder, subject.pipeline().denoise(conditioning, **subject.denoising), overwrite=False)
    file, pipe = load_latents(path), subject.pipeline()
    assert file.model_id is not None, "the file of latents doesn't say of which model they are"
    video = pipe.decode(Latents(**file.result(), config=pipe.spec.defaults.override(**file.settings)))
    assert video.config == subject.video.config, f"settings changed on the way: {video.config} and {subject.video.config}"
    assert np.array_equal(video.frames, subject.video.frames), "staged and one-shot videos differ"
    return "files between the stages; equal to one shot, bit for bit"


def check_file(subject: Subject) -> str:
    """The mp4 has every frame, and the record of how it was made."""
    outputs = Outputs(video=subject.scratch / "video.mp4")
    outputs.write(subject.pipe, subject.latents)
    size, record = video_size(outputs.video), read_record(outputs.video)
    assert size["frames"] == subject.video.frames.shape[1], f"{size['frames']} of {subject.video.frames.shape[1]} frames"
    asked = subject.video.config.to_dict()
    changed = [name for name, value in asked.items() if record[name] != value]
    assert not changed, f"the record says other {', '.join(changed)}"
    return f"mp4 of {size['frames']} frames, with its record"


def check_batch(subject: Subject) -> str:
    """Two prompts denoised together are what each is alone."""
    configs = [
        subject.pipe.spec.configure(**subject.settings | {"prompt": prompt, "negative_prompt": NEGATIVE_PROMPT, "seed": seed})
        for seed, prompt in enumerate((PROMPT, OTHER_PROMPT))
    ]
    conditionings = [subject.pipe.encode_config(config) for config in configs]
    together = subject.pipe.denoise_batch(conditionings, configs)
    alone = [subject.pipe.denoise_config(*each) for each in zip(conditionings, configs, strict=True)]
    error = float(
        np.max([_error(a.latents, b.latents) for a, b in zip(together, alone, strict=True)])
    )  # of NaN too, unlike Python's
    assert error <= CLOSE, f"in a batch of two, latents differ by {error:.1e} of the largest"
    return f"two videos at once: {error:.1e}"


def check_resume(subject: Subject) -> str:
    """Stopped after its first step, and gone on with: the same latents, bit for bit."""
    steps = subject.latents.config.num_inference_steps
    if steps < 2:
        raise NothingToCheck("conformance.settings have one step")
    cancel, folder = CancelToken(), subject.scratch / "resume"
    stop = Control(cancel=cancel, savepoint_dir=folder)
    try:
        subject.pipe.denoise(subject.conditioning, control=stop, on_step=lambda *_: cancel.cancel(), **subject.denoising)
        raise AssertionError("a cancelled run went on to its end; pass `loop` on to Sampler.sample")
    except Cancelled:
        pass
    again = subject.pipe.denoise(subject.conditioning, control=Control(savepoint_dir=folder, resume=True), **subject.denoising)
    assert again.history["denoise"].get("resumed"), "the resumed run began anew"
    assert np.array_equal(again.latents, subject.latents.latents), "the resumed run gave other latents"
    return f"stopped after 1 of {steps} steps, gone on with: the same latents"


def check_settings(subject: Subject) -> str:
    """Each setting that the model says it takes changes the latents."""
    values = {name: each.examples for name, each in SETTINGS.items() if each.examples and name not in ("cache", "window_size")}
    taken = {name: pair for name, pair in values.items() if name in subject.spec.takes}
    if not taken:
        raise NothingToCheck("it takes none of " + ", ".join(values))
    for name, pair in taken.items():
        a, b = (subject.pipe.denoise(subject.conditioning, **subject.denoising | {name: value}).latents for value in pair)
        assert not np.array_equal(a, b), f"{name}={pair[0]} and {name}={pair[1]} give the same latents; leave it out of takes"
    return f"{', '.join(taken)}: other latents"


def check_step_cache(subject: Subject) -> str:
    """Every registered cache runs, and saves what it says."""
    if "cache" not in subject.spec.takes:
        raise NothingToCheck("the model doesn't take cache; its blocks run as no scan")
    seen = []
    for name in registry().step_caches:
        given = {"cache": name, "cache_start_step": 1, "cache_step_interval": 2, "num_inference_steps": 5}
        saved, full = (
            subject.pipe.denoise(subject.conditioning, **subject.denoising | s) for s in (given, {"num_inference_steps": 5})
        )
        about = saved.history["denoise"]["cache"]
        assert about["saved_steps"] > 0 and not np.array_equal(saved.latents, full.latents), f"{name} changes nothing"
        seen.append(f"{name}: {about['saved_steps']} of 5 steps cached")
    return "; ".join(seen)


def check_window(subject: Subject) -> str:
    """A window that hides nothing changes nothing; one that hides, does."""
    if "window_size" not in subject.spec.takes:
        raise NothingToCheck("the model doesn't take window_size")
    frames = {"num_frames": 1 + 3 * subject.spec.rules.frame_step}
    full, narrow, wide = (
        subject.pipe.denoise(subject.conditioning, **subject.denoising | frames | window).latents
        for window in ({}, {"window_size": "frames=0"}, {"window_size": "frames=1000"})
    )
    assert np.array_equal(full, wide), "a window over all frames changes the latents"
    assert not np.allclose(full, narrow, atol=1e-3), "a window over one frame changes nothing"
    return "frames=0 hides, frames=1000 doesn't"


def check_decoders(subject: Subject) -> str:
    """Registered for this model: each makes as many frames of the same size as the model's own."""
    decoders = [d.name for p in registry().plugins for d in p.decoders if d.serves(subject.spec)]
    if not decoders:
        raise NothingToCheck("no other decoder is registered for it")
    if subject.spec.conformance is not None or subject.checkpoint is not None:
        raise NothingToCheck(f"{', '.join(decoders)} decode the model's own latents, which aren't here")
    own = subject.video.frames
    for name in decoders:
        spec, checkpoint = resolve_model(subject.spec.model_id, decoder=name)
        pipe = Pipeline(spec, checkpoint, Runtime.create(dtype="float32", devices=jax.devices()[:1]))
        video = pipe.decode(replace(subject.latents, model_id=""))
        frames, height, width = own.shape[1:4]
        _check_frames(video, height, width, frames)
    return f"{', '.join(decoders)}: frames as large and as many as the model's own"


def check_parity(subject: Subject) -> str:
    """Embeddings, latents and frames agree with those of the pipeline that the model is a port of."""
    conformance = subject.spec.conformance
    if conformance is None or conformance.reference is None:
        raise NothingToCheck("the spec's conformance names no reference")
    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT} | subject.settings
    expected = imported(conformance.reference)(subject.folder, subject.spec.configure(**settings))
    assert isinstance(expected, Mapping), f"the reference gives {type(expected).__name__}, not arrays by name"
    found = {"latents": subject.latents.latents, "frames": subject.video.frames, **subject.conditioning.tensors}
    assert {"latents", "frames"} <= set(expected), f"the reference gives {sorted(expected)}, not latents and frames"
    unknown = sorted(set(expected) - set(found))
    assert not unknown, f"the reference gives {unknown[0]}, which is none of {', '.join(found)}"
    errors = {name: _error(found[name], value) for name, value in expected.items()}
    wrong = [f"{name} differ by {error:.1e}" for name, error in errors.items() if not error <= CLOSE]
    assert not wrong, f"{'; '.join(wrong)} of the largest value"
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def check_mesh(subject: Subject) -> str:
    """Eight devices, in every layout that the model can have: what one computes."""
    seen = []
    for mesh in MESHES:
        try:
            pipe = subject.pipeline(devices=8, mesh=mesh)
            conditioning = pipe.encode(PROMPT, NEGATIVE_PROMPT, max_sequence_length=subject.settings.get("max_sequence_length"))
            latents = pipe.denoise(conditioning, **subject.denoising)
        except InputError as error:
            assert mesh is not None, f"eight devices get no layout of their own: {error}"
            seen.append(f"{mesh} refused")
            continue
        layout = latents.history["denoise"]["devices"].partition(", ")[2] if mesh is None else mesh
        errors = [_error(latents.latents, subject.latents.latents)]
        errors += [_error(conditioning.tensors[name], x) for name, x in subject.conditioning.tensors.items()]
        if mesh is None:
            frames = pipe.decode(replace(subject.latents, model_id=pipe.spec.model_id)).frames
            errors.append(_error(frames, subject.video.frames))
        largest = float(np.max(errors))
        assert largest <= CLOSE, f"mesh {layout}: {largest:.1e} of the largest value"
        seen.append(f"{layout} {largest:.0e}")
    return "; ".join(seen)


SUITE = (
    check_spec, check_light, check_found, check_shapes, check_bad_input, check_rules, check_determinism, check_staged,
    check_file, check_batch, check_resume, check_settings, check_step_cache, check_window, check_decoders, check_parity,
    check_mesh,
)  # fmt: skip
FIRST = (check_spec, check_found)
"""Where these fail, the others would fail for the same reason."""


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == expected.shape, f"shapes {list(found.shape)} and {list(expected.shape)} differ"
    largest = float(np.abs(expected.astype(np.float32)).max())
    return float(np.abs(found.astype(np.float32) - expected).max()) / (largest or 1.0)


@contextmanager
def _refused(what: str, containing: str = "") -> Iterator[None]:
    """Fails unless an `InputError` is raised."""
    try:
        yield
    except InputError as error:
        assert containing in str(error), f"the error for {what} doesn't say the value: {error}"
        return
    raise AssertionError(f"{what} was accepted")


@contextmanager
def _weights_unread() -> Iterator[None]:
    def read(weights: Weights, name: str, *_: Any) -> None:
        raise AssertionError(f"{name} was read before the inputs were checked")

    with mock.patch.object(Weights, "read", read):
        yield
