"""A broken plugin is one warned row, and everything else works: seen from the command line, with packages as pip leaves them."""

import json
import os
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
from tpuvid.stages import API_VERSION

GOOD = f"""
    from dataclasses import replace
    from tpuvid.hookspecs import hookimpl
    from tpuvid_wan.plugin import WAN_1_3B
    @hookimpl
    def tpuvid_models():
        return [replace(WAN_1_3B, model_id="giraffe", api_version={API_VERSION})]
"""


def returns(what, hook="models", imports=""):
    return f"""
    import dataclasses, json
    from pathlib import Path
    from tpuvid.hookspecs import hookimpl
    from tpuvid.stages import DecoderSpec, ModelSpec
    from tpuvid.stepcache import DeepCache
    from tpuvid_wan.plugin import WAN_1_3B
    {imports}
    @hookimpl
    def tpuvid_{hook}():
        return {what}
"""


@pytest.fixture
def zoo(tmp_path, tpuvid_command):
    """Installs a plugin where only its own child processes look, and runs commands there."""

    class Zoo:
        def install(self, source: str, *, requires=("tpuvid-core>=0.1,<0.2",), name="tpuvid-zoo", point="zoo") -> None:
            module = name.replace("-", "_")
            (tmp_path / f"{module}.py").write_text(dedent(source))
            about = tmp_path / f"{module}-1.0.dist-info"
            about.mkdir()
            wanted = "".join(f"Requires-Dist: {text}\n" for text in requires)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{wanted}")
            (about / "entry_points.txt").write_text(f"[tpuvid]\n{point} = {module}\n")

        def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
            path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
            env = os.environ | {"PYTHONPATH": path} | variables
            return subprocess.run([tpuvid_command, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)

    return Zoo()


def test_a_good_one_is_listed(zoo):
    zoo.install(GOOD)
    listed = zoo.run("list-models")
    assert listed.returncode == 0 and listed.stderr == "" and "giraffe" in listed.stdout and "tpuvid-zoo 1.0" in listed.stdout


BROKEN = {
    "raises": ("raise RuntimeError('no\\nluck')", "RuntimeError: no"),
    "is no Python": ("def (:", "SyntaxError"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "imports what is missing": ("import no_such_module_here", "No module named 'no_such_module_here'"),
    "hook raises": (returns("1 / 0"), "ZeroDivisionError"),
    "no list": (returns("3"), "TypeError: 'int' object is not iterable"),
    "no spec": (returns("['giraffe']"), "not a ModelSpec"),
    "misspelt hook": (returns("[]", hook="modelz"), "tpuvid_modelz"),
    "another API": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', api_version=1)]"),
        "giraffe is built for plugin API 1",
    ),
    "no API": (
        returns(
            "[ModelSpec(**{f.name: getattr(WAN_1_3B, f.name) for f in dataclasses.fields(ModelSpec) if f.name != 'api_version'})]"
        ),
        "missing 1 required keyword-only argument: 'api_version'",
    ),
    "terminal codes": (returns("[dataclasses.replace(WAN_1_3B, model_id='\\x1b[31mred')]"), "needs letters, digits"),
    "defaults are no config": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', defaults={'height': 3})]"),
        "defaults={'height': 3}",
    ),
    "defaults break its rules": (
        returns(
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', defaults=dataclasses.replace(WAN_1_3B.defaults, num_frames=80))]"
        ),
        "num_frames=80: needs 4n+1 frames",
    ),
    "takes what isn't": (returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', takes=('wings',))]"), "takes 'wings'"),
    "loader without a class": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', load_decoder='x')]"),
        "load_decoder='x'",
    ),
    "tile sizes are gone": (returns("[Path('nowhere.json')]", hook="block_sizes"), "nowhere.json, which does not exist"),
    "no cache": (returns("[3]", hook="step_caches"), "tpuvid_step_caches gave 3"),
    "no decoder": (returns("[WAN_1_3B]", hook="decoders"), "not a DecoderSpec"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_one_warned_row(zoo, fault):
    source, reason = BROKEN[fault]
    zoo.install(source)
    listed = zoo.run("list-models")
    assert listed.returncode == 0 and "wan-tiny" in listed.stdout and "giraffe" not in listed.stdout
    (warning,) = listed.stderr.splitlines()
    assert warning.startswith("warning: plugin zoo (tpuvid-zoo 1.0) does not load: ") and reason in warning


def test_doctor_names_it_and_the_others_run(zoo):
    zoo.install(BROKEN["raises"][0])
    report = json.loads((done := zoo.run("doctor", "--json")).stdout)
    assert done.returncode == 1 and "plugin zoo (tpuvid-zoo 1.0) does not load: RuntimeError: no" in report["problems"]
    (plugin,) = [plugin for plugin in report["plugins"] if plugin["name"] == "zoo"]
    assert plugin["error"] == "RuntimeError: no" and plugin["provides"] == []
    made = zoo.run(
        "generate", "--model", "wan-tiny", "--prompt", "a red circle", "--steps", "1", "--num-frames", "1", "-o", "a.mp4"
    )
    assert made.returncode == 0, made.stderr
    missing = zoo.run("generate", "--model", "giraffe", "--prompt", "x")
    assert missing.returncode == 2 and "not loaded: tpuvid-zoo; see tpuvid doctor" in missing.stderr


def test_what_it_prints_is_not_what_was_asked_for(zoo):
    zoo.install("print('hello')\n" + dedent(GOOD))
    listed = zoo.run("list-models", "--json")
    assert "giraffe" in {row["model"] for row in json.loads(listed.stdout)["models"]} and "hello" in listed.stderr


@pytest.mark.parametrize(
    "requires, reason",
    [
        (
            "tpuvid-core>=0.2,<0.3",
            "tpuvid-zoo 1.0 needs tpuvid-core<0.3,>=0.2, and 0.1.0 is installed; pip install -U tpuvid-zoo",
        ),
        ("tpuvid-core==0.0.9", "needs tpuvid-core==0.0.9, and 0.1.0 is installed"),
        ("tpuvid-wan>1", "needs tpuvid-wan>1, and 0.1.0 is installed"),
        ("giraffes>=2", "tpuvid-zoo needs giraffes>=2, which is not installed; pip install 'giraffes>=2'"),
    ],
)
def test_declared_versions_are_enforced_when_it_loads(zoo, requires, reason):
    """Before any of its code runs: what would happen then is anybody's guess."""
    zoo.install("raise AssertionError('it ran')", requires=["click", requires])
    (warning,) = zoo.run("list-models").stderr.splitlines()
    assert reason in warning


@pytest.mark.parametrize("requires", ["tpuvid-core>=0.1,<0.2", "giraffes; extra == 'test'", "giraffes; python_version < '3'"])
def test_what_fits_or_is_not_needed_loads(zoo, requires):
    zoo.install(GOOD, requires=[requires])
    assert zoo.run("list-models").stderr == ""


@pytest.mark.parametrize(
    "source, said",
    [
        (
            returns("[dataclasses.replace(WAN_1_3B, model_id='wan-tiny')]"),
            "model id 'wan-tiny' is registered by tpuvid-tiny and tpuvid-zoo",
        ),
        (returns("[DeepCache]", hook="step_caches"), "step cache 'deepcache' is registered by tpuvid-core and tpuvid-zoo"),
        (
            returns("[dataclasses.replace(PREVIEW)]", hook="decoders", imports="from tpuvid_tiny.plugin import PREVIEW"),
            "decoder 'preview of wan-tiny' is registered by tpuvid-tiny and tpuvid-zoo",
        ),
    ],
    ids=["model", "step cache", "decoder"],
)
def test_a_name_of_two_packages_is_one_warned_row(zoo, source, said):
    zoo.install(source)
    listed = zoo.run("list-models")
    (warning,) = listed.stderr.splitlines()
    assert warning == f"warning: {said}; uninstall one, or exclude it with TPUVID_PLUGINS=-name"
    assert listed.returncode == 0 and "wan2.1-t2v-1.3b" in listed.stdout
    assert zoo.run("list-models", TPUVID_PLUGINS="-zoo").stderr == ""


def test_variables_allow_and_deny(zoo):
    zoo.install(GOOD)
    only = zoo.run("list-models", TPUVID_PLUGINS="zoo").stdout
    assert "giraffe" in only and "cogvideox" not in only
    assert "giraffe" not in zoo.run("list-models", TPUVID_PLUGINS="-zoo").stdout
    unknown = zoo.run("generate", "--model", "giraffe", "--prompt", "x", "--cache", "nope", TPUVID_PLUGINS="zoo")
    assert "cache='nope': choose from deepcache" in unknown.stderr, "core's own are always there"


def test_one_that_imports_jax_fails_the_check(zoo):
    zoo.install("import jax\n" + dedent(GOOD))
    done = zoo.run("plugin", "check", "giraffe", "--checkpoint", str(Path(__file__).parent))
    assert done.returncode == 1 and "FAIL  light" in done.stdout and "imports ['jax']" in done.stdout


def test_hooks_of_another_package_work(zoo):
    """A step cache from a package that has no model."""
    source = """
    from dataclasses import dataclass
    from tpuvid.hookspecs import hookimpl
    from tpuvid.stepcache import DeepCache

    @dataclass(frozen=True)
    class EveryOther(DeepCache):
        start_step: int = 1
        end_step: int = 1000
        step_interval: int = 2
        name = "every-other"

    @hookimpl
    def tpuvid_step_caches():
        return [EveryOther]
    """
    zoo.install(source)
    assert zoo.run("list-models").stderr == ""
    made = zoo.run("generate", "--model", "wan-tiny", "--prompt", "a red circle", "--steps", "6", "--num-frames", "1", "--cache", "every-other", "-o", "a.mp4")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "cache: every-other: full steps 0-1, 3, 5; cached steps 2, 4" in made.stdout
