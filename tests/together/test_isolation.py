"""A broken plugin is one warned row, and everything else works: seen from the command, with packages as pip leaves them."""

import json
import os
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
from shared import processes
from tpuvid.contract import API_VERSION

ONE_FRAME = ("--prompt", "a red circle", "--num-frames", "1", "-o", "a.mp4")

GOOD = f"""
    from dataclasses import replace
    from tpuvid.contract.hookspecs import hookimpl
    from tpuvid_wan.plugin import WAN_1_3B
    @hookimpl
    def tpuvid_models():
        return [replace(WAN_1_3B, model_id="giraffe", api_version={API_VERSION})]
"""


def returns(what, hook="models", imports=""):
    return f"""
    import dataclasses, json
    from pathlib import Path
    from tpuvid.contract.hookspecs import hookimpl
    from tpuvid.contract.models import DecoderSpec, ModelSpec
    from tpuvid.compute.step_caches import DeepCache
    from tpuvid_wan.plugin import WAN_1_3B
    {imports}
    @hookimpl
    def tpuvid_{hook}():
        return {what}
"""


@pytest.fixture
def zoo(tmp_path):
    """Installs a plugin where only its own child processes look, and runs commands there."""

    class Zoo:
        folder = tmp_path

        def install(self, source: str, *, requires=("tpuvid-core>=0.1,<0.2",), name="tpuvid-zoo", point="zoo") -> None:
            module = name.replace("-", "_")
            (tmp_path / f"{module}.py").write_text(dedent(source or ""))
            module = name if source is None else module
            about = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
            about.mkdir()
            wanted = "".join(f"Requires-Dist: {text}\n" for text in requires)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{wanted}")
            (about / "entry_points.txt").write_text(f"[tpuvid]\n{point} = {module}\n")

        def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
            path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
            env = os.environ | {"PYTHONPATH": path} | variables
            return processes.tpuvid(*arguments, env=env, cwd=tmp_path)

    return Zoo()


def test_a_good_one_is_listed(zoo):
    zoo.install(GOOD)
    listed = zoo.run("list-models")
    assert listed.returncode == 0 and listed.stderr == "" and "giraffe" in listed.stdout and "tpuvid-zoo 1.0" in listed.stdout


BROKEN = {
    "raises": ("raise RuntimeError('no\\nluck')", "RuntimeError: no"),
    "is no module": (None, "its entry point names 'tpuvid-zoo', which is no module; write it with '_' and '.'"),
    "no Exception": ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust"),
    "error that can't be shown": (
        "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
        "E, which can't say what it is",
    ),
    "long and colourful": ("raise ValueError('\x1b[31m' + 'x' * 10**6)", "ValueError: [31mxxx"),
    "no marker": ("def tpuvid_models():\n    return []", "tpuvid_models is not marked with @hookimpl"),
    "no hook": ("x = 1", "has no hook; mark a function tpuvid_models"),
    "hook with other arguments": (
        "from tpuvid.contract.hookspecs import hookimpl\n@hookimpl\ndef tpuvid_models(what):\n    return []",
        "Argument(s) {'what'} are declared in the hookimpl",
    ),
    "components are no folders": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', components=WAN_1_3B.components | {'decode': ('vae')})]"),
        "components['decode']='vae' needs a tuple of names",
    ),
    "components outside": (
        returns(
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', components=WAN_1_3B.components | {'decode': ('../vae',)})]"
        ),
        "components['decode']='../vae' needs letters",
    ),
    "flow shifts": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', flow_shifts=('a', 3))]"),
        "not (pixels, shift)",
    ),
    "rules below one": (
        returns(
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', rules=dataclasses.replace(WAN_1_3B.rules, size_multiple=-16))]"
        ),
        "rules.size_multiple=-16 needs a whole number",
    ),
    "defaults take what isn't taken": (
        returns(
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', takes=(), "
            "defaults=dataclasses.replace(WAN_1_3B.defaults, cache='x'))]"
        ),
        "defaults.cache='x', which takes doesn't name",
    ),
    "rows of two lines": (
        returns("[dataclasses.replace(WAN_1_3B, model_id='giraffe', family='a\\nb')]"),
        "needs a line of text",
    ),
    "decoder's name": (
        returns(
            "[DecoderSpec(name='own', models=('wan',), checkpoint='a:b', component='c', load_decoder='d:e', api_version=3)]",
            hook="decoders",
        ),
        "decoder='own' is the name of every model's own",
    ),
    "tile sizes are no table": (returns("[Path(__file__)]", hook="block_sizes"), "JSONDecodeError"),
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
            "[ModelSpec(**{f.name: getattr(WAN_1_3B, f.name) "
            "for f in dataclasses.fields(ModelSpec) if f.name != 'api_version'})]"
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
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', "
            "defaults=dataclasses.replace(WAN_1_3B.defaults, num_frames=80))]"
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
    assert done.returncode == 1 and "plugin zoo (tpuvid-zoo 1.0) does not load: RuntimeError: no luck" in report["problems"]
    (plugin,) = [plugin for plugin in report["plugins"] if plugin["name"] == "zoo"]
    assert plugin["error"] == "RuntimeError: no luck" and plugin["provides"] == []
    made = zoo.run("generate", "--model", "wan-tiny", "--steps", "1", *ONE_FRAME)
    assert made.returncode == 0, made.stderr
    missing = zoo.run("generate", "--model", "giraffe", "--prompt", "x")
    assert missing.returncode == 2 and "not loaded: tpuvid-zoo; see tpuvid doctor" in missing.stderr


def test_damaged_metadata_is_a_row_too(zoo, tmp_path):
    """A package is half removed, or its files are no text."""
    zoo.install(BROKEN["raises"][0])
    (about := tmp_path / "tpuvid_zoo-1.0.dist-info").joinpath("METADATA").unlink()
    assert zoo.run("generate", "--model", "giraffe", "--prompt", "x").returncode == 2
    (warning,) = zoo.run("list-models").stderr.splitlines()
    assert f"plugin zoo ({about.name} ?) does not load: RuntimeError: no luck" in warning
    about.joinpath("entry_points.txt").write_bytes(b"\xff\xfe\x00" * 50)
    listed = zoo.run("list-models")
    assert listed.returncode == 0 and "wan-tiny" in listed.stdout and "entry_points.txt can't be read" in listed.stderr


@pytest.mark.parametrize("point", ["wan", "core"])
def test_a_name_of_ours_takes_nothing_from_us(zoo, point):
    zoo.install("x = 1", point=point)
    listed = zoo.run("list-models")
    (warning,) = listed.stderr.splitlines()
    assert "wan2.1-t2v-14b" in listed.stdout and f"plugin {point} (tpuvid-zoo 1.0)" in warning
    unknown = zoo.run("generate", "--model", "wan-tiny", "--prompt", "x", "--cache", "nope")
    assert "choose from deepcache" in unknown.stderr
    assert zoo.run("list-models", TPUVID_PLUGINS="tiny").stderr == "", "an allow-list means ours alone by core"


def test_a_folder_stays_with_the_family_that_implements_it(zoo, tmp_path):
    """Whatever else claims its pipeline class, unless it says more of the transformer."""
    zoo.install(
        returns("[dataclasses.replace(WAN_1_3B, model_id='aardvark', signature={}, load_denoiser='tpuvid_zoo:Nothing')]"),
        point="aardvark",
    )
    from tpuvid.plugin.lookup import resolve_model

    made = zoo.run("generate", "--model", str(resolve_model("wan-tiny")[1].folder), "--steps", "1", *ONE_FRAME)
    assert made.returncode == 0, made.stderr


def test_what_can_not_be_imported_is_its_packages_fault(zoo, tmp_path):
    zoo.install(
        returns(
            "[dataclasses.replace(WAN_1_3B, model_id='giraffe', checkpoint='tpuvid_tiny:checkpoint', "
            "load_decoder='tpuvid_zoo:Nothing')]"
        )
    )
    done = zoo.run(
        "generate",
        "--model",
        "giraffe",
        "--prompt",
        "x",
        "--height",
        "64",
        "--width",
        "64",
        "--num-frames",
        "5",
        "--steps",
        "1",
    )
    assert done.returncode == 1 and "giraffe: tpuvid_zoo:Nothing can't be imported" in done.stderr
    assert "mend its package" in done.stderr and "download" not in done.stderr


def test_one_that_ends_the_program_makes_no_success(zoo):
    source = """
    from dataclasses import dataclass
    from tpuvid.contract.hookspecs import hookimpl
    from tpuvid.compute.step_caches import DeepCache

    @dataclass(frozen=True)
    class Quitter(DeepCache):
        name = "quitter"
        def full_steps(self, num_inference_steps):
            raise SystemExit(0)

    @hookimpl
    def tpuvid_step_caches():
        return [Quitter]
    """
    zoo.install(source)
    done = zoo.run("generate", "--model", "wan-tiny", "--prompt", "x", "--cache", "quitter", "-o", "a.mp4")
    assert done.returncode == 1 and done.stderr.startswith("tpuvid: error: SystemExit")


COMMAND = returns(
    "[CommandSpec(name='serve', load_command='zoo_server:serve', help='Shows animals.')]",
    hook="commands",
    imports="from tpuvid.contract import CommandSpec",
)


def test_a_command_is_imported_when_it_is_run(zoo):
    zoo.install(COMMAND)
    server = zoo.folder / "zoo_server.py"
    server.write_text("import click\n@click.command()\n@click.option('--port')\ndef serve(port): print(port); return 4\n")
    served = zoo.run("serve", "--port", "80")
    assert (served.returncode, served.stdout, served.stderr) == (4, "80\n", "")
    assert "--port" in zoo.run("serve", "--help").stdout
    assert "command serve" in zoo.run("doctor").stdout
    for spoilt, reason in (
        ("import sys; sys.exit(0)", "(SystemExit: 0)"),
        ("import giraffes", "(ModuleNotFoundError: No module named 'giraffes')"),
        ("serve = 3", "zoo_server:serve is a int, no click command"),
    ):
        server.write_text(spoilt)
        failed = zoo.run("serve")
        assert failed.returncode == 1 and failed.stderr.startswith("tpuvid: error: serve: ") and reason in failed.stderr
        assert len(failed.stderr.splitlines()) == 1 and "mend its package" in failed.stderr
        helped = zoo.run("--help")
        assert helped.returncode == 0 and "Shows animals." in helped.stdout and helped.stderr == ""


def test_a_command_of_ours_can_not_be_taken(zoo):
    zoo.install(COMMAND.replace("'serve'", "'plan'"))
    (warning,) = zoo.run("list-models").stderr.splitlines()
    assert "command='plan' is tpuvid's own; choose another name" in warning
    assert "--topology" in zoo.run("plan", "--help").stdout
    assert "No such command 'serve'. (not loaded: tpuvid-zoo; see tpuvid doctor)" in zoo.run("serve").stderr


def test_a_command_of_two_packages_says_so_when_it_is_run(zoo):
    zoo.install(COMMAND)
    zoo.install(COMMAND, name="tpuvid-ark", point="ark")
    said = "command 'serve' is registered by tpuvid-ark and tpuvid-zoo; uninstall one, or set TPUVID_PLUGINS=-ark or"
    (warning,) = zoo.run("list-models").stderr.splitlines()
    refused = zoo.run("serve")
    assert said in warning and said in refused.stderr and refused.returncode == 2
    assert zoo.run("--help").returncode == 0


def test_what_it_prints_is_not_what_was_asked_for(zoo):
    loud = "import os, sys; print('hello'); os.write(1, b'hello'); os.system('echo hello')"
    zoo.install(f"{loud}\n" + dedent(GOOD))
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


def test_who_needs_what_is_refused_is_refused_too(zoo):
    """The code of the one runs in the other's stages."""
    zoo.install("raise AssertionError('it ran')", requires=["tpuvid-core>=0.2,<0.3"])
    zoo.install("raise AssertionError('it ran')", requires=["tpuvid-zoo"], name="tpuvid-park", point="park")
    first, second = zoo.run("list-models").stderr.splitlines()
    refused = "tpuvid-zoo 1.0 needs tpuvid-core<0.3,>=0.2, and 0.1.0 is installed"
    assert "plugin park (tpuvid-park 1.0) does not load" in first and refused in first
    assert "plugin zoo (tpuvid-zoo 1.0) does not load" in second and refused in second


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
    owner = "core" if "tpuvid-core" in said else "tiny"
    assert warning == f"warning: {said}; uninstall one, or set TPUVID_PLUGINS=-{owner} or TPUVID_PLUGINS=-zoo"
    assert listed.returncode == 0 and "wan2.1-t2v-1.3b" in listed.stdout
    assert zoo.run("list-models", TPUVID_PLUGINS="-zoo").stderr == ""


def test_variables_allow_and_deny(zoo):
    zoo.install(GOOD)
    only = zoo.run("list-models", TPUVID_PLUGINS="zoo").stdout
    assert "giraffe" in only and "cogvideox" not in only
    assert "giraffe" not in zoo.run("list-models", TPUVID_PLUGINS="-zoo").stdout
    unknown = zoo.run("generate", "--model", "giraffe", "--prompt", "x", "--cache", "nope", TPUVID_PLUGINS="zoo")
    assert "cache='nope': choose from deepcache" in unknown.stderr, "core's own are always there"


@pytest.mark.parametrize(
    "what, said",
    [("TPUVID_PLUGINS names it", "nope"), ("TPUVID_PLUGINS names it", "-nope"), ("both allows and denies it", "wan,-wan")],
)
def test_variables_that_mean_nothing_are_a_row(zoo, what, said):
    (warning,) = zoo.run("list-models", TPUVID_PLUGINS=said).stderr.splitlines()
    assert what in warning


@pytest.mark.parametrize(
    "ends",
    [
        "os._exit(0)",
        pytest.param("sys.exit(0)", marks=pytest.mark.slow),
        pytest.param("raise BaseException('x')", marks=pytest.mark.slow),
    ],
)
def test_one_that_ends_the_check_is_a_line_of_the_sheet(zoo, ends):
    zoo.install(
        dedent(GOOD)
        + "\nclass Decoder:\n    verify = load = check = decode = None\n"
        + f"    def __init__(self, *_):\n        import os, sys; {ends}\n"
    )
    zoo_module = Path(zoo.folder) / "tpuvid_zoo.py"
    zoo_module.write_text(
        zoo_module.read_text().replace('model_id="giraffe",', 'model_id="giraffe", load_decoder="tpuvid_zoo:Decoder",')
    )
    done = zoo.run("plugin", "check", "giraffe", "--json")
    assert done.returncode == 1
    (sheet,) = json.loads(done.stdout)
    assert [row["check"] for row in sheet["results"] if row["passed"] is False] == ["found"]


def test_one_that_imports_jax_fails_the_check(zoo):
    zoo.install("import jax\n" + dedent(GOOD))
    done = zoo.run("plugin", "check", "giraffe", "--checkpoint", str(Path(__file__).parent))
    assert done.returncode == 1 and "FAIL  light" in done.stdout and "imports ['jax']" in done.stdout


def test_hooks_of_another_package_work(zoo):
    """A step cache from a package that has no model."""
    source = """
    from dataclasses import dataclass
    from tpuvid.contract.hookspecs import hookimpl
    from tpuvid.compute.step_caches import DeepCache

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
    made = zoo.run("generate", "--model", "wan-tiny", "--steps", "6", "--cache", "every-other", *ONE_FRAME)
    assert made.returncode == 0, made.stderr
    assert "cache: every-other: full steps 0-1, 3, 5; cached steps 2, 4" in made.stdout
