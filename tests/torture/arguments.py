"""Any command line at all: an answer or one line, never a traceback, and nothing written where nothing was done."""

import contextlib
import io
from collections import Counter
from pathlib import Path
from unittest import mock

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tpuvid.cli.main import cli, run
from tpuvid.errors import TpuvidError

from torture.audit import check_silence

ODD = [
    "", "-", "--", "-1", "0", "1", "5", "17", "64", "1e9", "nan", "inf", "-inf", "0x10", "９", "1..3", "a=b", "seed=0..2",
    "seed=2..0", "wan-tiny", "wan2.1-t2v-1.3b", "owner/name", "../..", "/", "/dev/null", "/proc/self/mem", ".", "~", "\n", "💥",
    "x" * 5000, "dp=2,tp=4", "v6e-8", "cpu", "deepcache", "frames=16", "bfloat16", "%s", "$(touch /tmp/pwned)", "`id`",
    "'; rm -rf /", "\udcff",
]  # fmt: skip
TOPOLOGIES_THAT_COMPILE = ("plan", "compile", "attention")


class Reached(TpuvidError):
    """Everything was checked: the rest would be work."""


def reached(*_: object, **__: object) -> None:
    raise Reached("stop here")


def torture(work: Path, count: int, start: int) -> Counter:
    """So many command lines made by hypothesis; returns the counts by exit code."""
    counts: Counter = Counter()
    files = _files(work)

    @seed(start)
    @settings(max_examples=count, deadline=None, database=None, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(_command_lines(files))
    def one(line: list[str]) -> None:
        before = _listing(work)
        out, err = io.StringIO(), io.StringIO()
        heavy = (
            "tpuvid.load", "tpuvid.plan.planner.Planner.plan", "tpuvid.plan.compilation.compile_pack",
            "tpuvid.plan.tune.tune_attention", "tpuvid.plan.tune.attention_shapes", "tpuvid.cli.doctor.examine",
            "tpuvid.files.checkpoint.download", "tpuvid.testing.runner._in_a_process", "tpuvid.plugin.new._make_checkpoint",
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            for name in heavy:
                stack.enter_context(mock.patch(name, reached))
            stack.enter_context(mock.patch("sys.stdin", io.StringIO("a prompt\n")))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            code = run(line)
        check_silence(err.getvalue())
        assert code in (0, 1, 2), (line, code)
        assert code == 0 or err.getvalue().startswith("tpuvid: error: "), (line, err.getvalue())
        assert code != 1 or "stop here" in err.getvalue(), (line, err.getvalue())
        assert _listing(work) == before or code == 0, f"{line}: wrote {_listing(work) ^ before}"
        counts[f"exit code {code}" + (", everything checked" if "stop here" in err.getvalue() else "")] += 1

    with contextlib.chdir(work):
        one()
    return counts


def _files(work: Path) -> list[str]:
    """What arguments may name: files of every kind of content."""
    contents = {
        "empty": b"", "p.txt": b"a cat\na dog\n", "p.csv": b"prompt,seed\na cat,1\na dog,x\n",
        "q.csv": b"prompt,seed\na cat,1\n", "p.jsonl": b'{"prompt": "a cat", "seed": 3}\n',
        "c.yaml": b"model: wan-tiny\nprompt: a cat\nsteps: 2\n", "d.yaml": b"- a\n", "no.mp4": b"no",
        "no.safetensors": b"\x10\0\0\0\0\0\0\0{}", "no.json": b"{", "latin": b"\xe9\xff",
    }  # fmt: skip
    for name, content in contents.items():
        (work / name).write_bytes(content)
    (work / "folder").mkdir()
    return [*contents, "folder", "folder/new.mp4", "new.mp4"]


def _listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def _command_lines(files: list[str]) -> st.SearchStrategy[list[str]]:
    text = st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8
    )  # what the system lets through
    words = st.one_of(st.sampled_from(ODD + files), text, st.integers().map(str), st.floats().map(str))
    commands = dict(_commands(cli, ()))

    @st.composite
    def line(draw: st.DrawFn) -> list[str]:
        path = draw(st.sampled_from(sorted(commands)))
        found = [*path]
        options = [parameter for parameter in commands[path].params if isinstance(parameter, click.Option)]
        required = [option for option in options if option.required or option.name in ("prompt", "input_dir")]
        chosen = draw(st.lists(st.sampled_from(options), max_size=4)) if options else []
        for option in [*(o for o in required if draw(st.integers(0, 9))), *chosen]:
            found.append(draw(st.sampled_from(option.opts)))
            if not option.is_flag:
                found.append(draw(_values(option, words, files)))
        if draw(st.integers(0, 9)) < (
            6 if any(isinstance(p, click.Argument) and p.required for p in commands[path].params) else 1
        ):
            found += draw(st.lists(words, min_size=1, max_size=3))
        return found

    return line()


def _values(option: click.Option, words: st.SearchStrategy[str], files: list[str]) -> st.SearchStrategy[str]:
    """Now and then what it is meant for, so that the checks behind are reached too."""
    match option.name:
        case "model":
            fitting = st.sampled_from(["wan-tiny", "wan2.1-t2v-14b", "cogvideox1.5-5b-t2v", "hunyuanvideo-1.5-t2v-720p"])
        case "height" | "width":
            fitting = st.sampled_from(["64", "256", "480", "720", "65"])
        case "num_frames" | "num_inference_steps" | "seed" | "fps":
            fitting = st.integers(-1, 100).map(str)
        case "topology" | "topology_name":
            fitting = st.sampled_from(["v6e-8", "v6e-1", "cpu", "v5e-3", "v9"])
        case _ if isinstance(option.type, click.Choice):
            fitting = st.sampled_from(list(option.type.choices))
        case _ if isinstance(option.type, click.Path):
            fitting = st.sampled_from(files)
        case _:
            fitting = st.integers(0, 20).map(str)
    return st.one_of(*[fitting] * 6, words)


def _commands(group: click.Group, path: tuple[str, ...]):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command
