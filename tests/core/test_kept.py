"""What is kept from one process for the next: used where nothing has changed, made again where anything has."""

import os
import sys
import time
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from tpuvid.compute import kept_programs
from tpuvid.compute.kept_programs import KeptPrograms
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.packs.pack import signature
from tpuvid.contract import MeshConfig
from tpuvid.family import Runtime, Scan, TracedModule, build
from tpuvid.files import kept as kept_module
from tpuvid.files.kept import Entry, Kept

ENTRY = Entry({"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}, {"says": "é"})


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path)


def unmade():
    raise AssertionError("was made, and stands there already")


def only_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def test_an_entry_is_made_once(kept):
    kept.get("thing", {"key": 1}, lambda: ENTRY)
    found = kept.get("thing", {"key": 1}, unmade)
    assert found.about == ENTRY.about and np.array_equal(found.arrays["a"], ENTRY.arrays["a"])
    for other in (("thing", {"key": 2}), ("other", {"key": 1})):
        assert kept.find(*other) is None
    assert kept.within("scope").find("thing", {"key": 1}) is None


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Kept().get("thing", 1, lambda: ENTRY) is ENTRY and list(tmp_path.iterdir()) == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def become_a_link(path):
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    "spoil",
    [
        flip,
        become_a_link,
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o666),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["flipped", "a link", "truncated", "empty", "writable by others", "a pipe"],
)
def test_what_is_not_as_it_was_left_is_made_again(kept, tmp_path, spoil):
    kept.add("thing", 1, ENTRY)
    spoil(only_file(tmp_path))
    made = []
    kept.get("thing", 1, lambda: made.append(1) or ENTRY)
    assert made == [1] and kept.find("thing", 1) is not None


def test_what_can_not_be_removed_is_made_each_time(kept, tmp_path):
    kept.add("thing", 1, ENTRY)
    path = only_file(tmp_path)
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    assert kept.get("thing", 1, lambda: ENTRY) is ENTRY


def test_sources_that_have_changed_are_noticed(kept, tmp_path, monkeypatch):
    package = tmp_path / "path" / "some_library"
    package.mkdir(parents=True)
    for name in ("__init__", "layers"):
        (package / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    layers = ModuleType("some_library.layers")
    layers.__file__ = str(package / "layers.py")
    kept.add("thing", 1, ENTRY._replace(sources=[layers, sys.modules["math"]]))
    assert kept.find("thing", 1) is not None
    (package / "layers.py").write_text("x = 22\n")
    assert kept.find("thing", 1) is None
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in tmp_path.glob("*.safetensors"))
    kept_module._root.cache_clear()


def test_versions_and_our_own_sources_are_part_of_every_key(tmp_path, monkeypatch):
    python, versions, sources = environment = kept_programs.environment()
    assert {"torch", "diffusers", "jaxlib"} <= set(versions)
    Kept(tmp_path, environment).add("thing", 1, ENTRY)
    assert Kept(tmp_path, environment).find("thing", 1) is not None
    for changed in ([python, versions | {"torch": "0"}, sources], [python, versions, "0"]):
        assert Kept(tmp_path, changed).find("thing", 1) is None
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path))
    assert Kept.in_cache(environment).environment == environment


def test_what_nobody_uses_goes(kept, tmp_path):
    kept.add("thing", 1, ENTRY)
    old = only_file(tmp_path)
    long_ago = time.time() - (kept_module.UNUSED_DAYS + 1) * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    assert kept.find("thing", 1) is not None, "using it makes it young again"
    os.utime(old, (long_ago, long_ago))
    kept.add("thing", 2, ENTRY)
    assert not old.exists() and kept.find("thing", 2) is not None


def test_a_cache_that_can_not_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="nothing is kept for the next start"):
        assert Kept.in_cache(None).get("thing", 1, lambda: ENTRY) is ENTRY


def test_the_packages_that_stages_are_of_enter_the_environment(monkeypatch):
    """Also of one that isn't loaded itself: its plugin may be switched off. Not of one that isn't there."""
    spec = SimpleNamespace(load_text_encoder="json.encode:A", load_denoiser="email:B", load_decoder="nowhere.decode:C")
    plugin = SimpleNamespace(module="html.plugin", error=None, models=[spec], decoders=[])
    hashed = []
    monkeypatch.setattr(kept_programs, "registry", lambda: SimpleNamespace(plugins=[plugin]))
    monkeypatch.setattr(kept_programs, "source_hash", hashed.append)
    kept_programs.environment.__wrapped__()
    assert hashed == [("email", "html", "json")]


# Programs


@pytest.fixture
def compiled(tmp_path):
    """What a "process" gets for a function, and whether it compiled it."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def get(*args, key="stage", how="f", function=lambda x: jnp.sin(x) * 2):
        programs, made = KeptPrograms(Kept(tmp_path)), []
        if key is not None:
            programs.serve(key)

        def make():
            made.append(1)
            return jax.jit(function).lower(*args).compile()

        return programs.get([how], args, mesh, make)(*args), bool(made)

    return get


def test_a_program_is_compiled_once(compiled, tmp_path):
    x = np.linspace(0, 1, 5, dtype=np.float32)
    first, made = compiled(x)
    again, made_again = compiled(x)
    assert made and not made_again and np.array_equal(first, again)
    for change in (dict(key="other stage"), dict(how="g"), dict(key=None)):
        assert compiled(x, **change)[1], change
    assert compiled(x[:3])[1] and compiled(x.astype(np.int32))[1]
    assert np.array_equal(compiled(x[:3])[0], first[:3])
    with jax.numpy_rank_promotion("raise"):
        assert compiled(x)[1], "JAX's settings are part of the key"


def test_bytes_that_are_no_program_are_made_again(compiled, tmp_path):
    x = np.ones(3, np.float32)
    compiled(x)
    path = only_file(tmp_path)
    kept = Kept(tmp_path).within("stage")
    key = [["f"], signature((x,), make_mesh(MeshConfig(), jax.devices()[:1])), kept_programs._flags()]
    assert kept._path("program", key) == path
    kept.add("program", key, kept.find("program", key)._replace(arrays={"program": np.zeros(100, np.uint8)}))
    assert compiled(x)[1] and not compiled(x)[1]


def test_what_jaxs_own_cache_gives_is_not_taken_for_compiled(compiled, tmp_path):
    """On a CPU a program that came out of it lacks its code once it is serialized again."""
    x = np.linspace(0, 1, 64, dtype=np.float32)

    def one():
        """Another function at each call, of the same program, as another process has it."""

        def function(x):
            return jnp.log(jnp.cumsum(jnp.sin(x) ** 2) + 1.5) * jnp.float32(0.731)

        return function

    jax.jit(one()).lower(x).compile()  # now it is in JAX's cache, if that is in use
    first, _ = compiled(x, function=one())
    again, made = compiled(x, function=one())
    assert not made and np.array_equal(first, again)


def test_a_runtime_keeps_programs_by_all_that_they_are_compiled_with(tmp_path):
    def run(variant, donate=()):
        runtime = Runtime.create(kept=KeptPrograms(Kept(tmp_path)))
        runtime.kept.serve("stage")
        mesh, x = make_mesh(MeshConfig(), runtime.devices), jnp.ones(4)
        return runtime.programs(mesh).get("f", lambda x: x + variant, x, variant=variant, donate=donate)(x)

    assert run(1)[0] == 2 and run(2)[0] == 3 and run(1)[0] == 2
    assert len(list(tmp_path.glob("program-*"))) == 2
    run(1, donate=(0,))
    assert len(list(tmp_path.glob("program-*"))) == 3


# Outlines of modules


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.config = {"depth": depth, "patch": (1, 2)}
        self.facts = {"keep_in_fp32": ("norm",), "scale": 2.0}
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.register_buffer("table", torch.arange(4.0))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.blocks[0].linear.weight if depth == 1 else self.head.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.table


def test_a_module_is_built_when_something_is_traced(kept):
    built = []

    def make():
        built.append(1)
        return build(Model)

    def traced():
        return TracedModule(make, scan={"blocks": Scan(1)}, kept=kept, key={"depth": 3})

    first, again = traced(), traced()
    assert built == [1]
    bfloat16 = np.dtype(jnp.bfloat16)
    assert again.parameters(bfloat16) == first.parameters(bfloat16)
    assert again.parameters(bfloat16)["blocks.*.norm.weight"].dtype == np.float32
    assert again.parameters(bfloat16)["blocks.*.linear.weight"].dtype == bfloat16
    assert again.sources() == first.sources() and again.depth("blocks.*.norm.weight") == 3
    assert again.config.patch == [1, 2] and again.config["depth"] == 3 and again.facts.scale == 2.0
    assert list(again.buffers()) == ["table"]
    params = {name: jnp.ones(s.shape) for name, s in again.parameters(np.dtype(np.float32)).items()} | again.buffers()
    x = jnp.linspace(0, 1, 8).reshape(2, 4)
    found = jax.jit(again.function())(params, x)
    assert built == [1, 1]
    assert np.array_equal(found, jax.jit(first.function())(params, x))


def test_an_outline_is_of_its_key_its_function_and_its_scan(kept):
    def make():
        return build(Model)

    for change in ({}, dict(key=2), dict(scan=None), dict(scan={"blocks": Scan(1, tokens={"x": 0})})):
        TracedModule(make, **(dict(scan={"blocks": Scan(1)}, kept=kept, key=1) | change))
    TracedModule(lambda: build(Model), scan={"blocks": Scan(1)}, kept=kept, key=1)
    assert len(list(kept.folder.glob("outline-*"))) == 5
