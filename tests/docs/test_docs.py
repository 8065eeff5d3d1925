"""The documentation does what it says.

Every fenced block of README.md, CONTRIBUTING.md and docs/ is run as it stands, a page's blocks in order, in one folder, by the
command's own entry point, or its title says what it would need (`blocks.py` lists the titles). Of commands, run or not, the
flags, models, sizes and topologies are checked. ``make …`` is checked to be a target of the Makefile, ``pip install …`` to name
distributions of this workspace: tests/test_packaging.py installs those, and a test doesn't run the tests. Tables about models
are made from the registry or compared with it, and the site is built with all warnings as errors.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from docs.blocks import (
    NEEDS_LIBTPU,
    ROOT,
    Block,
    Wrong,
    blocks,
    check_block,
    check_command,
    commands,
    flags,
    make_targets,
    pages,
)
from shared.pipes import kept
from tpuvid.cli.main import run

sys.path.insert(0, str(ROOT / "scripts"))
from docs_hooks import workspace_plugins  # noqa: E402  (after the path)

pytestmark = pytest.mark.optimized  # so many steps are run that compiling well pays
RUN_ELSEWHERE = {"docs/plugins.md"}
"""It writes a package and installs it: test_tutorial.py runs it. Here what it says of tpuvid and make is checked."""


def is_run(block: Block) -> bool:
    return block.language in ("sh", "python") and not block.is_file and not block.title.startswith("needs")


CHANGES = [
    "CHANGELOG.md",
    *sorted(f"packages/{path.parent.name}/CHANGELOG.md" for path in (ROOT / "packages").glob("*/CHANGELOG.md")),
]
PAGES = [page for page in pages() if (ROOT / page).exists()]
RUN = [page for page in PAGES if page not in RUN_ELSEWHERE and any(is_run(block) for block in blocks(page))]
COMPILED: set[str] = set()
"""Blocks that take minutes, and that several pages have."""
AOT = [page for page in PAGES if any(block.title == NEEDS_LIBTPU for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_whatever_a_page_says_can_be_typed(page):
    for block in blocks(page):
        check_block(block)
        if block.language == "sh":
            for command in block.commands():
                if page not in RUN_ELSEWHERE:
                    check_command(command, block.where, refused=block.exit_code == 2)
                elif command[0] in ("tpuvid", "make"):
                    check_command(command, block.where, registered=False)


SLOW = {"docs/packs.md", "docs/planning.md"}
"""Pages whose commands tests/together/test_packs.py and test_plan.py run too."""


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in RUN])
def test_what_a_page_says_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpuvid.load", kept)
    run_all(blocks(page), tmp_path)


@pytest.mark.aot
@pytest.mark.parametrize("page", AOT)
def test_what_a_page_says_about_tpus_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.title == NEEDS_LIBTPU and block.text not in COMPILED:
            typed(block)
            COMPILED.add(block.text)


def run_all(page: Iterable[Block], folder: Path) -> None:
    namespace: dict = {"__name__": "__main__"}
    printed = ""
    for block in page:
        if block.is_file:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text + "\n", "utf-8")
        elif block.title == "prints":
            missing = [line for line in block.text.splitlines() if line not in printed.splitlines()]
            assert not missing, f"{block.where}: {missing[0]!r} is not in\n{printed}"
        elif is_run(block):
            printed = typed(block) if block.language == "sh" else executed(block, namespace)


def typed(block: Block) -> str:
    """What a block's commands print, once each has ended as the page says."""
    printed = ""
    for program, *arguments in block.commands():
        if program == "tpuvid":  # others are looked at by check_command
            with captured() as output:
                code = run(arguments)
            printed += output.getvalue()
            assert code == block.exit_code, (
                f"{block.where}: tpuvid {' '.join(arguments)}: exit code {code}\n{output.getvalue()}"
            )
    return printed


def executed(block: Block, namespace: dict) -> str:
    with captured() as output:
        exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), namespace)
    return output.getvalue()


@contextlib.contextmanager
def captured():
    """stdout and stderr, as a terminal shows them: in one."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


@pytest.mark.parametrize(
    "text, says",
    [
        ("```\ntpuvid doctor\n```", "a fence of no language"),
        ("```bash\ntpuvid doctor\n```", "a fence of bash"),
        ('```sh title="later"\ntpuvid doctor\n```', "is none of those"),
        ("```sh {.big}\ntpuvid doctor\n```", "after the language comes title="),
        ("```sh\ntpuvid doctor", "without an end"),
        ("text\n\n    tpuvid doctor --json\n", "in an indented block"),
        ("```python\nprint(\n```", "is no python"),
        ("```yaml\na: [\n```", "is no yaml"),
        ("```sh\ntpuvid doctr\n```", "No such command"),
        ("```sh\ntpuvid tune attentions --topology v6e-8\n```", "No such command"),
        ("```sh\ntpuvid generate --model wan-tiny --prompt x --stepz 3\n```", "No such option"),
        ('```sh title="needs a TPU"\ntpuvid generate --model wan2.1-t2v-14b --prompt x --stepz 3\n```', "No such option"),
        ('```sh title="needs a TPU"\ntpuvid generate --model wan2.1-t2v-14 --prompt x\n```', "did you mean wan2.1-t2v-14b"),
        (
            '```sh title="needs a TPU"\ntpuvid generate --model wan2.1-t2v-14b --prompt x --num-frames 80\n```',
            "nearest: 77 and 81",
        ),
        ('```sh title="needs libtpu"\ntpuvid plan --model wan2.1-t2v-14b --topology v6e-3\n```', "v6e comes as"),
        ("```sh\ntpuvid encode --model wan-tiny\n```", "Missing option '--prompt'"),
        ("```sh\nmake tests\n```", "has no such target"),
        ("```sh\npip install tpuvid-wann\n```", "is no distribution"),
        ('```sh\npip install "tpuvid-core[gpu]"\n```', "is no distribution"),
        ("```sh\npip uninstall tpuvid-wan\n```", "no test knows how to check"),
        ("```sh\npython benchmarks/nothing.py\n```", "is not in the repository"),
        ("```sh\nrm -rf outputs\n```", "no test knows how to check"),
    ],
)
def test_what_cannot_be_typed_is_found(text, says):
    with pytest.raises(Wrong, match=re.escape(says)):
        for block in blocks("page.md", text):
            check_block(block)
            for command in block.commands():
                check_command(command, block.where)


@pytest.mark.parametrize(
    "text, says",
    [
        ("```sh\ntpuvid inspect nothing.mp4\n```", "exit code 2"),
        ('```sh title="exit code 2"\ntpuvid --version\n```', "exit code 0"),
        ('```sh\ntpuvid --version\n```\n```text title="prints"\nno version\n```', "'no version' is not in"),
        ("```python\nassert False, 'wrong'\n```", "wrong"),
    ],
)
def test_what_does_not_run_is_found(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=says):
        run_all(blocks("page.md", text), tmp_path)


def prose(page: str) -> str:
    """All of it but the fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_in_a_sentence_exist(page):
    known = {" ".join(path) for path, _ in commands()}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        program, *rest = code.split()
        if program == "make" and len(rest) == 1:
            assert rest[0] in make_targets(), f"{page}: `{code}`"
        if program == "python" and rest and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file(), f"{page}: `{code}`"
        if program == "tpuvid" and rest and re.fullmatch("[a-z][a-z-]+", rest[0]):
            assert rest[0] in known, f"{page}: `{code}`"
        if program == "tpuvid" or program.startswith("--"):
            for flag in re.findall(r"(?<!\S)--[a-z][a-z_-]+", code):
                assert flag.replace("_", "-") in flags(), f"{page}: `{code}`"


def test_the_readme_table_says_what_is_registered():
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    said = {row[0].strip("`"): row[1:] for row in rows}
    registered = {s.model_id: (p.package, s) for p in workspace_plugins() for s in p.models}
    assert said.keys() == registered.keys()
    for model, (package, parameters, use) in said.items():
        dist, spec = registered[model]
        d = spec.defaults
        assert package == f"`{dist}`"
        assert parameters.replace(" ", "").startswith(spec.parameters)
        assert use.startswith(f"{d.width}×{d.height}, {d.num_frames} frames")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text("utf-8"))


def test_the_site_has_all_models_commands_and_classes(site):
    models, reference, api = (text_of(site / f"{name}.html") for name in ("models", "cli", "api"))
    for model in [spec.model_id for plugin in workspace_plugins() for spec in plugin.models]:
        assert models.count(model) >= 3  # in all three tables
    for path, command in commands():
        assert f"tpuvid {' '.join(path)}" in reference
        assert all(name in reference for p in command.params for name in p.opts if name.startswith("--"))
    users = ("tpuvid.load", "GenerationConfig", "Cancelled")
    for name in (*users, "tpuvid_models", "ModelSpec", "VaeDecoder", "TracedModule", "tpuvid.testing.check"):
        assert name in api
    assert "generated:" not in models


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|link)[^>]*>", page.read_text("utf-8"))
        assert not [tag for tag in tags if re.search(r'(?:src|href)=["\']?(?:https?:)?//', tag)], page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *CHANGES, *(p for p in PAGES if p.startswith("docs/"))])
def test_links_lead_somewhere(page):
    """As a forge shows the files; the site's own links are checked where it is built."""
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}"


def anchors(path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
