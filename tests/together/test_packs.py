"""Packs: what is made in one process runs in another without compiling, and one that doesn't fit, or is damaged, never runs."""

import dataclasses
import functools
import json
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tpuvid
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file
from tpuvid.cli.main import run
from tpuvid.compute import run_key as keys
from tpuvid.compute.packs import pack as packs
from tpuvid.compute.packs.pack import HEADER, PackWriter, read_pack, signature, tree_from_json, tree_to_json
from tpuvid.compute.stage_loader import open_stage
from tpuvid.contract.options import Options
from tpuvid.contract.stages import STAGES
from tpuvid.errors import InputError
from tpuvid.family import Runtime
from tpuvid.plan.compilation import compile_pack
from tpuvid.plugin.lookup import resolve_model

SIZE = dict(height=32, width=32, num_frames=5)
PROMPT = "a red circle moving right on a black background"
CACHE = dict(cache="deepcache", cache_start_step=1, cache_end_step=4, cache_step_interval=2)
FLAGS = ["--model", "wan-tiny", "--prompt", PROMPT, "--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def pack_file(tmp_path_factory) -> Path:
    """wan-tiny's programs for this CPU, made as the command makes them; with a cache, so that there are two kinds of step."""
    path = tmp_path_factory.mktemp("packs") / "tiny.pack"
    settings = SIZE | CACHE | {"num_inference_steps": 5}
    made = compile_pack("wan-tiny", "cpu", path, settings=settings, options=Options())
    assert made.path == path and made.bytes == path.stat().st_size
    assert [p["stage"] for p in made.programs] == ["encode", *["denoise"] * 3, *["decode"] * 2]
    assert [p.name for p in path.parent.iterdir()] == ["tiny.pack"]
    return path


@pytest.fixture
def forbid_loading(monkeypatch):
    """Whatever would unpickle a program fails the test."""
    import jax.experimental.serialize_executable as jax_side

    monkeypatch.setattr(jax_side, "deserialize_and_load", lambda *_, **__: pytest.fail("a program was deserialized"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("something was unpickled"))


def settings(**changes):
    return SIZE | CACHE | {"num_inference_steps": 4, "seed": 3} | changes


def compiled(history) -> list[str]:
    return [name for about in history.values() for name in about["seconds"] if name.startswith("compile")]


def test_a_fresh_process_gives_the_same_video_and_compiles_nothing(pack_file, tmp_path):
    """With another prompt, seed, number of steps, scale, shift and other cached steps than the pack was made with."""
    config = settings(guidance_scale=2.5, flow_shift=2.0, cache_start_step=2, cache_step_interval=3, fps=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = (
        "import json, sys, numpy, tpuvid; config = json.load(open('config.json'))\n"
        "video = tpuvid.load('wan-tiny', pack=sys.argv[1], trust_pack=True).generate('a blue square growing', **config)\n"
        "numpy.save('frames.npy', video.frames); json.dump(video.history, open('history.json', 'w'))"
    )
    environment = os.environ | {"TPUVID_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, pack_file], check=True, cwd=tmp_path, env=environment)
    history = json.loads((tmp_path / "history.json").read_text())
    assert compiled(history) == []
    assert history["encode"]["loaded from pack"] == "text encoder"
    assert history["denoise"]["loaded from pack"] == "prompt's keys and values; full step (deepcache); cached step (deepcache)"
    assert history["decode"]["loaded from pack"] == "decoder, first frame; decoder, further frames"
    plain = tpuvid.load("wan-tiny").generate("a blue square growing", **config)
    assert compiled(plain.history)
    np.testing.assert_array_equal(np.load(tmp_path / "frames.npy"), plain.frames)


def test_stages_run_alone_from_the_pack_of_all(pack_file):
    """Each asks for its own programs' fields only."""
    pipe = tpuvid.load("wan-tiny", pack=pack_file, trust_pack=True)
    conditioning = pipe.encode(PROMPT)
    latents = pipe.denoise(conditioning, **settings())
    video = pipe.decode(latents)
    assert compiled(video.history) == []


def test_what_a_pack_lacks_is_compiled_and_said(pack_file, tmp_path, capsys):
    """Losing a run is worse than waiting."""
    pack = read_pack(pack_file, trusted=True)
    without = tuple(p for p in pack.programs if not p.name.startswith("cached"))
    pipe = tpuvid.load("wan-tiny", pack=dataclasses.replace(pack, programs=without))
    latents = pipe.denoise(pipe.encode(PROMPT), **settings())
    about = latents.history["denoise"]
    assert compiled(latents.history) == ["compile cached step (deepcache)"]
    assert about["loaded from pack"] == "prompt's keys and values; full step (deepcache)"
    assert about["compiled beside the pack"] == "cached step (deepcache) (not in it for these shapes)"


def test_what_jax_cannot_load_is_compiled_and_said(pack_file, monkeypatch):
    import jax.experimental.serialize_executable as jax_side

    def refuse(*_, **__):
        raise RuntimeError("this executable is for another machine\nmore")

    monkeypatch.setattr(jax_side, "deserialize_and_load", refuse)
    about = tpuvid.load("wan-tiny", pack=pack_file, trust_pack=True).encode(PROMPT).history["encode"]
    expected = "text encoder (can't be loaded here: this executable is for another machine)"
    assert about["compiled beside the pack"] == expected
    assert "loaded from pack" not in about


@pytest.mark.parametrize(
    "options, changes, says",
    [
        ({}, dict(height=48), r"height=32, this run has height=48; pass --height 32, or make a pack"),
        ({}, dict(width=48), "width=32, this run has width=48; pass --width 32"),
        ({}, dict(num_frames=9), "num_frames=5, this run has num_frames=9; pass --num-frames 5"),
        ({}, dict(guidance_scale=1.0), "guidance=on, this run has guidance=off; pass a --guidance-scale above 1"),
        ({}, dict(max_sequence_length=64), "max_sequence_length=512, this run has max_sequence_length=64; pass"),
        (dict(dtype="bfloat16"), {}, "dtype=float32, this run has dtype=bfloat16; pass --dtype float32"),
        (dict(attention_backend="xla"), {}, "attention_backend=auto, this run has attention_backend=xla; pass"),
        (dict(vae_tiling=True), {}, "vae_tiling=off, this run has vae_tiling=on; leave out --vae-tiling"),
        (dict(text_encoder_device="cpu"), {}, "text_encoder_device=device, this run has text_encoder_device=cpu; pass"),
    ],
    ids=str,
)
def test_a_run_that_differs_is_refused_by_field(pack_file, forbid_loading, forbid_weights, options, changes, says):
    pipe = tpuvid.load("wan-tiny", pack=pack_file, trust_pack=True, **options)
    forbid_weights()
    with pytest.raises(InputError, match=says):
        pipe.generate(PROMPT, **settings(**changes))


def test_another_cache_is_refused(pack_file, forbid_loading):
    with pytest.raises(InputError, match="cache=deepcache, this run has cache=none; pass --cache deepcache"):
        tpuvid.load("wan-tiny", pack=pack_file, trust_pack=True).generate(PROMPT, **SIZE, num_inference_steps=2)


def this_run(**changes):
    """The key of a run that fits `pack_file`, but for `changes`."""
    spec, checkpoint = resolve_model("wan-tiny")
    runtime = Runtime.create()
    stages = {name: open_stage(spec, name, checkpoint, runtime) for name in STAGES}
    config = stages["denoise"].resolve(spec.configure(**settings()))
    return keys.run_key(spec, stages, config, runtime) | changes


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("family", "hunyuan", "family=wan, this run has family=hunyuan; make a pack"),
        ("source", "0", "source="),
        ("kernels", "0", "kernels="),
        ("mesh", "dp=2,tp=1", "mesh=dp=1, this run has mesh=dp=2,tp=1; pass --mesh dp=1"),
        ("jax", "9.9", "install jax=="),
        ("jaxlib", "9.9", "install jaxlib=="),
        ("torch", "9.9", "install torch=="),
        ("torchax", "9.9", "install torchax=="),
        ("diffusers", "9.9", "install diffusers=="),
        ("transformers", "9.9", "install transformers=="),
        ("libtpu", "9.9", "libtpu=None, this run has libtpu=9.9"),
        ("platform", "tpu", "platform=cpu, this run has platform=tpu"),
        ("device_kind", "TPU v6 lite", "device_kind=cpu"),
        ("device_count", 8, "device_count=1, this run has device_count=8"),
        ("device_order", [[1, 0]], "device_order="),
        ("cpu", "arm64", "cpu="),
        ("matmul_precision", "highest", "matmul_precision=None, this run has matmul_precision=highest"),
        ("x64", True, "x64=False"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "XLA_FLAGS=--xla_cpu_use.*; set XLA_FLAGS='--xla_cpu_use"),
        ("LIBTPU_INIT_ARGS", "--x", "LIBTPU_INIT_ARGS=, .*; unset LIBTPU_INIT_ARGS"),
    ],
)
def test_every_other_field_is_named_too(pack_file, field, value, says):
    pack = read_pack(pack_file)
    run_ = run_key()
    assert field in run_ or field == "libtpu"  # which only TPUs' packs have
    with pytest.raises(InputError, match=says):
        pack.check(run_ | {field: value})


_this_run: dict = {}


def run_key() -> dict:
    if not _this_run:
        _this_run.update(this_run())
    return _this_run


def test_fields_of_the_test_are_those_of_the_key(pack_file):
    """A run that fits agrees in all, so that the tests above name each for its own sake."""
    read_pack(pack_file).check(run_key())
    assert keys.key_hash(run_key()) == keys.key_hash(dict(read_pack(pack_file).key))


def test_a_config_that_differs_is_named_by_its_entry(pack_file):
    configs = json.loads(json.dumps(run_key()["configs"]))
    configs["denoise"][0]["eps"] = 0.5
    with pytest.raises(InputError, match="configs: denoise: eps=1e-06, this run has configs: denoise: eps=0.5; make a pack"):
        read_pack(pack_file).check(run_key() | {"configs": configs})


def test_a_config_that_says_the_same_in_other_words_fits(pack_file, tmp_path):
    """A registered model's bundled configs leave out defaults and bookkeeping that the published files spell out."""
    spec, checkpoint = resolve_model("wan-tiny")
    folder = shutil.copytree(checkpoint.folder, tmp_path / "copy")
    for component, more in {
        "text_encoder": {
            "use_cache": True,
            "transformers_version": "4.0",
            "output_past": True,
            "is_gated_act": True,
            "pad_token_id": 1,
            "dropout_rate": 0.5,
            "initializer_factor": 2.0,
        },
        "transformer": {"_diffusers_version": "0.1", "pos_embed_seq_len": None},
    }.items():
        file = folder / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    checkpoint = dataclasses.replace(checkpoint, folder=folder)
    same = {n: keys.module_configs(open_stage(spec, n, checkpoint, Runtime.create())) for n in ("encode", "denoise")}
    read_pack(pack_file).check({"configs": same})


def test_only_the_first_of_several_fields_is_spelt_out(pack_file):
    with pytest.raises(InputError, match=r"this run has height=1 \(width, jax differ too\)"):
        read_pack(pack_file).check(run_key() | {"height": 1, "width": 2, "jax": "0"})


def test_the_command_refuses_without_trust_and_unpickles_nothing(pack_file, forbid_loading, tmp_path, capsys):
    flags = [*FLAGS, "--cache", "deepcache", "--cache-start-step", "0", "-o", str(tmp_path / "a.mp4")]
    assert run(["generate", *flags, "--pack", str(pack_file)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "holds compiled code" in said[0] and "add --trust-pack" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_loader_without_trust_refuses_too(pack_file, forbid_loading):
    pack = read_pack(pack_file)
    with pytest.raises(InputError, match="--trust-pack"):
        pack.load(pack.programs[0], (), Mesh(np.array(jax.devices()[:1]), "x"))
    with pytest.raises(InputError, match="--trust-pack"):
        tpuvid.load("wan-tiny", pack=pack_file).encode(PROMPT)


def rewritten(source: Path, target: Path, change) -> Path:
    """A pack of the same tensors and header, after `change(tensors, metadata)`."""
    with safe_open(source, framework="numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()}
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_bomb_with_good_checksums_does_not_go_off(pack_file, tmp_path, capsys):
    import hashlib
    import zlib

    def arm(tensors, metadata):
        data = zlib.compress(pickle.dumps(Bomb(tmp_path / "it ran")))
        programs = json.loads(metadata["programs"])
        for program in programs:
            tensors[program["tensor"]] = np.frombuffer(data, np.uint8)
            program |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        metadata["programs"] = json.dumps(programs)
        header = json.loads(metadata[HEADER])
        metadata[HEADER] = json.dumps(header | {"digest": packs._digest(metadata["key"], metadata["programs"])})

    armed = rewritten(pack_file, tmp_path / "armed.pack", arm)
    cache = ["--cache", "deepcache", "--cache-start-step", "0"]
    assert run(["generate", *FLAGS, *cache, "--pack", str(armed), "-o", str(tmp_path / "a.mp4")]) == 2
    assert "--trust-pack" in capsys.readouterr().err
    assert run(["inspect", str(armed)]) == 0
    assert not (tmp_path / "it ran").exists()


def flip(tensors, metadata):
    tensors["1"][100] ^= 1


def drop(tensors, metadata):
    del tensors["2"]


def add(tensors, metadata):
    tensors["more"] = np.zeros(3, np.uint8)


def forge(tensors, metadata):
    metadata["key"] = metadata["key"].replace('"height": 32', '"height": 64')


def outdate(tensors, metadata):
    metadata[HEADER] = json.dumps(json.loads(metadata[HEADER]) | {"format": 99})


def garble(tensors, metadata):
    metadata[HEADER] = "{"


def strip(tensors, metadata):
    metadata.clear()


@pytest.mark.parametrize(
    "change, says",
    [
        (flip, 'keys and values" is damaged'),
        (drop, "header is damaged"),
        (add, "header is damaged"),
        (forge, "header is damaged"),
        (outdate, "has format 99, this tpuvid reads format 1"),
        (garble, "header is damaged"),
        (strip, "is no pack"),
    ],
)
def test_a_damaged_or_foreign_pack_is_one_line_and_2(pack_file, tmp_path, capsys, forbid_loading, change, says):
    bad = rewritten(pack_file, tmp_path / "bad.pack", change)
    assert run(["generate", *FLAGS, "--pack", str(bad), "--trust-pack", "-o", str(tmp_path / "a.mp4")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_pack_is_one_line_and_2(pack_file, tmp_path, capsys, length):
    bad = tmp_path / "bad.pack"
    bad.write_bytes(pack_file.read_bytes()[:length])
    assert run(["generate", *FLAGS, "--pack", str(bad), "--trust-pack", "-o", str(tmp_path / "a.mp4")]) == 2
    said = capsys.readouterr().err
    assert "no complete safetensors file" in said and said.count("\n") == 1


def test_trust_without_a_pack_is_a_mistake(tmp_path, capsys):
    assert run(["generate", *FLAGS, "--trust-pack", "-o", str(tmp_path / "a.mp4")]) == 2
    assert "add --pack, or leave out --trust-pack" in capsys.readouterr().err


def test_a_program_that_jax_restored_is_what_was_written(tmp_path):
    """Donation, results by name, several devices' layouts: as before they were packed."""
    mesh = Mesh(np.array(jax.devices()[:1]), "x")
    salt = np.float32(secrets.randbits(20))  # a program that no cache has: one that comes out of a cache can't be packed

    def double(params, state):
        return state * params["w"] + state * 0 * salt, {"sum": state.sum(), "first": [state[:1]]}, {3: state}, None

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.device_put(({"w": np.float32(2)}, np.arange(4, dtype=np.float32)), sharding)
    program = jax.jit(double, donate_argnums=1).lower(*args).compile()
    writer = PackWriter()
    writer.add("denoise", "double", program, args, mesh)
    writer.write(tmp_path / "x.pack", {"family": "wan"})
    pack = read_pack(tmp_path / "x.pack", trusted=True)
    loaded = pack.load(pack.find("double", signature(args, mesh)), args, mesh)
    assert jax.tree.structure(loaded.out_info) == jax.tree.structure(program.out_info)
    assert [o.sharding for o in jax.tree.leaves(loaded.out_info)] == [o.sharding for o in jax.tree.leaves(program.out_info)]
    result, more, numbered, nothing = loaded(*args)
    assert result.tolist() == [0, 2, 4, 6] and more["sum"] == 6 and more["first"][0].tolist() == [0]
    assert numbered[3].tolist() == [0, 1, 2, 3] and nothing is None
    assert args[1].is_deleted() and not args[0]["w"].is_deleted()


def test_signatures_tell_shapes_dtypes_trees_and_layouts_apart():
    mesh = Mesh(np.array(jax.devices()[:1]), "x")
    on_device = jax.device_put(np.zeros(4, np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    others = [(np.zeros(5, np.float32),), (np.zeros(4, np.int32),), ([np.zeros(4, np.float32)],), (on_device,)]
    found = {signature(args, mesh) for args in [(np.zeros(4, np.float32),), *others]}
    assert len(found) == 5
    struct = jax.ShapeDtypeStruct((4,), np.float32, sharding=on_device.sharding)
    single = jax.device_put(on_device, jax.devices()[0])  # the same place under another name
    assert signature((struct,), mesh) == signature((on_device,), mesh) == signature((single,), mesh)


def test_trees_are_data():
    tree = (1, None, [2, {"a": 3, 4: (5,)}])
    assert tree_from_json(json.loads(json.dumps(tree_to_json(tree)))) == (0, None, [0, {"a": 0, 4: (0,)}])
    with pytest.raises(TypeError, match="can't be packed"):
        tree_to_json(SimpleNamespace())
    with pytest.raises(ValueError, match="describes no tree"):
        tree_from_json({"set": []})


def test_inspect_says_what_a_pack_holds(pack_file, capsys):
    assert run(["inspect", str(pack_file)]) == 0
    said = capsys.readouterr().out
    assert "pack of wan" in said and "full step (deepcache)" in said and "height = 32" in said


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--topology", "v9-8"], "is no TPU slice"),
        (["--topology", "gpu"], "packs are made for TPU slices and for the CPU"),
        (["--topology", "cpu", "--height", "33"], "nearest"),
        (["--topology", "cpu", "--mesh", "tp=64"], "needs 64 devices; there"),
    ],
)
def test_a_compile_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, capsys, arguments, says):
    assert run(["compile", "-q", "--model", "wan-tiny", *arguments, "-o", str(tmp_path / "a.pack")]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_libtpu_compile_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tpuvid.plan.topologies.find_spec", lambda name: None)
    assert run(["compile", "--model", "wan-tiny", "--topology", "v6e-1", "-o", str(tmp_path / "a.pack")]) == 2
    assert "pip install 'tpuvid-core[tpu]'" in capsys.readouterr().err


def test_an_existing_pack_is_not_replaced(tmp_path, capsys):
    (tmp_path / "a.pack").write_text("mine")
    assert run(["compile", "--model", "wan-tiny", "--topology", "cpu", "-o", str(tmp_path / "a.pack")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "a.pack").read_text() == "mine"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_compile_leaves_nothing(tmp_path, tpuvid_command, how):
    command = [tpuvid_command, "compile", "--model", "wan-tiny", "--topology", "cpu", "-o", str(tmp_path / "a.pack")]
    # a shell's background jobs inherit that SIGINT is ignored
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed)
    wait_until(lambda: children(process.pid))
    (job,) = children(process.pid)
    wait_until(lambda: list(tmp_path.iterdir()))
    process.send_signal(how)
    process.wait(10)
    wait_until(lambda: not Path(f"/proc/{job}").exists())
    assert not list(tmp_path.iterdir())


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_whatever_a_program_is_traced_from_makes_a_pack_anothers(tmp_path, monkeypatch):
    """A plugin's stages, in a package or a single file, and a step cache of another package."""
    (module := tmp_path / "one_file.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    before = keys.sources_hash("one_file")
    keys.sources_hash.cache_clear()
    module.write_text("a = 2")
    assert keys.sources_hash("one_file") != before
    spec = dataclasses.replace(resolve_model("wan-tiny")[0], load_decoder="one_file:Decoder")
    assert keys._packages(spec, spec.defaults) == ("one_file", "tpuvid_wan")
    monkeypatch.setattr(keys, "step_cache", lambda config: type("Cache", (), {"__module__": "zoo.caches"})())
    assert keys._packages(spec, spec.defaults) == ("one_file", "tpuvid_wan", "zoo")
