import sys
import types
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
from tpuvid.contract import CommandSpec, GenerationConfig, ModelSpec, SizeRules, hookimpl
from tpuvid.errors import InputError
from tpuvid.plugin.registry import Registry, load_plugins

LARGE = ModelSpec(
    model_id="zebra-14b",
    family="zebra",
    api_version=3,
    pipeline_class="ZebraPipeline",
    checkpoint="zoo/zebra-14b",
    parameters="14B",
    signature={"num_layers": 40, "in_channels": 16},
    defaults=GenerationConfig(height=720, width=1280, num_frames=81, fps=16, num_inference_steps=50, guidance_scale=5.0),
    rules=SizeRules(frame_step=4, size_multiple=16, max_frames=4093, max_size=16384),
    components={"encode": ("text_encoder",), "denoise": ("transformer",), "decode": ("vae",)},
    load_text_encoder="zebra.encode:Encoder",
    load_denoiser="zebra.denoise:Denoiser",
    load_decoder="zebra.decode:Decoder",
)
SMALL = replace(LARGE, model_id="zebra-1.3b", checkpoint="zoo/zebra-1.3b", signature={"num_layers": 30, "in_channels": 16})


@pytest.fixture
def plugin(monkeypatch):
    """Makes an entry point whose module holds `contents`."""

    def make(name, **contents):
        module = types.ModuleType(f"fake_{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name, module.__name__, "tpuvid")

    return make


def models(*specs):
    @hookimpl
    def tpuvid_models():
        return list(specs)

    return tpuvid_models


def good(plugin, name="good", spec=LARGE):
    return plugin(name, tpuvid_models=models(spec))


def test_models_come_from_every_plugin(plugin):
    registry = load_plugins([good(plugin), good(plugin, "other", SMALL)])
    assert set(registry.models) == {LARGE.model_id, SMALL.model_id}
    assert not registry.broken


def raising():
    @hookimpl
    def tpuvid_models():
        raise RuntimeError("no luck\nsecond line")

    return tpuvid_models


def commands(*specs):
    @hookimpl
    def tpuvid_commands():
        return list(specs)

    return tpuvid_commands


SERVE = CommandSpec(name="serve", load_command="zebra.server:serve", help="Make what is asked for over HTTP.")


def misspelt():
    @hookimpl
    def tpuvid_modelz():
        return []

    return tpuvid_modelz


@pytest.mark.parametrize(
    "contents, reason",
    [
        (dict(tpuvid_models=raising()), "RuntimeError: no luck"),
        (dict(tpuvid_modelz=misspelt()), "tpuvid_modelz"),
        (dict(tpuvid_models=models("wan")), "not a ModelSpec"),
        (dict(tpuvid_models=models(replace(SMALL, api_version=99))), "plugin API 99"),
        (dict(tpuvid_commands=commands("serve")), "not a CommandSpec"),
        (dict(tpuvid_commands=commands(replace(SERVE, name="my_server"))), "needs lower-case letters, digits and hyphens"),
        (dict(tpuvid_commands=commands(replace(SERVE, load_command="zebra.server"))), "not of the form 'package.module:name'"),
        (dict(tpuvid_commands=commands(replace(SERVE, help="two\nlines"))), "needs a line of text"),
        (dict(tpuvid_commands=commands(replace(SERVE, name="generate"))), "command='generate' is tpuvid's own"),
        (dict(tpuvid_commands=commands(replace(SERVE, name="plan"))), "command='plan' is tpuvid's own"),
    ],
)
@pytest.mark.parametrize("name", ["later", "zoo"])
def test_a_broken_plugin_is_one_row_and_the_others_work(plugin, contents, reason, name):
    """Whether it loads before or after the last good one."""
    registry = load_plugins([good(plugin), plugin(name, **contents), good(plugin, "yet", replace(SMALL, model_id="third"))])
    (broken,) = registry.broken
    assert broken.name == name and reason in broken.error and "\n" not in broken.error
    assert {LARGE.model_id, "third"} <= set(registry.models)


def test_a_command_of_two_packages_is_nobodys(plugin):
    registry = load_plugins([plugin("a", tpuvid_commands=commands(SERVE)), plugin("b", tpuvid_commands=commands(SERVE))])
    (problem,) = registry.problems
    assert "command 'serve' is registered by" in problem and not registry.commands and registry.command("other") is None
    with pytest.raises(InputError, match="TPUVID_PLUGINS=-a or TPUVID_PLUGINS=-b"):
        registry.command("serve")


def test_a_duplicate_id_is_nobodys(plugin):
    """Neither package may take it from the other; what else they register works."""
    registry = load_plugins([plugin("a", tpuvid_models=models(LARGE)), plugin("b", tpuvid_models=models(LARGE, SMALL))])
    (problem,) = registry.problems
    assert "model id 'zebra-14b' is registered by fake_a and fake_b; uninstall one" in problem
    assert set(registry.models) == {SMALL.model_id}
    with pytest.raises(InputError, match="registered by fake_a and fake_b; uninstall one"):
        registry.get(LARGE.model_id)


def test_a_selected_plugin_that_is_not_there_is_a_row(plugin):
    (row,) = load_plugins([good(plugin)], "wnan").broken
    assert row.name == "wnan" and "no such plugin" in row.error


def test_missing_module_is_one_row(plugin):
    registry = load_plugins([EntryPoint("gone", "no_such_module_here", "tpuvid"), good(plugin)])
    assert "ModuleNotFoundError" in registry.broken[0].error
    assert registry.get(LARGE.model_id) == LARGE


@pytest.mark.parametrize(
    "selection, left", [("good", {"good"}), ("-good", {"other"}), ("good, other", {"good", "other"}), ("", {"good", "other"})]
)
def test_selection(plugin, selection, left):
    registry = load_plugins([good(plugin), good(plugin, "other", SMALL)], selection)
    assert {p.name for p in registry.plugins} == left


def test_unknown_model_names_the_nearest(plugin):
    registry = load_plugins([good(plugin), good(plugin, "other", SMALL)])
    with pytest.raises(InputError, match=r"'zebra-14' is not known; did you mean zebra-14b"):
        registry.get("zebra-14")
    with pytest.raises(InputError, match="installed: zebra-1.3b, zebra-14b"):
        registry.get("zzz")
    with pytest.raises(InputError, match="pip install tpuvid-wan"):
        Registry(()).get("zzz")


def test_a_folder_is_matched_by_its_transformer(plugin):
    registry = load_plugins([good(plugin), good(plugin, "other", SMALL)])
    assert registry.match("ZebraPipeline", dict(SMALL.signature) | {"eps": 1e-6}) == SMALL
    assert registry.match("ZebraPipeline", {"num_layers": [2]}).pipeline_class == "ZebraPipeline"
    with pytest.raises(InputError, match="'FluxPipeline' has no plugin; installed plugins run ZebraPipeline"):
        registry.match("FluxPipeline", {})
