"""What makes a pack, and what is kept, another's."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tpuvid
from tpuvid.compute.run_key import source_hash
from tpuvid.files import sources


@pytest.fixture
def core(tmp_path, monkeypatch):
    """A copy of core, whose sources are hashed in the place of the installed one's."""
    copy = tmp_path / "tpuvid"
    shutil.copytree(Path(tpuvid.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def find_spec(name):
        return SimpleNamespace(submodule_search_locations=[str(copy.joinpath(*name.split(".")[1:]))])

    monkeypatch.setattr(sources, "find_spec", find_spec)
    yield copy
    sources.sources_hash.cache_clear()
    source_hash.cache_clear()


def source_now() -> str:
    sources.sources_hash.cache_clear()
    source_hash.cache_clear()
    return source_hash(())


def change(path: Path) -> None:
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")


def test_programs_are_traced_from_one_folder_of_core(core):
    """A change elsewhere, as in runs/asked/sweep.py, leaves packs and what is kept as good as they were."""
    before = source_now()
    elsewhere = [path for path in core.rglob("*.py") if path.relative_to(core).parts[0] != "compute"]
    assert core / "runs" / "asked" / "sweep.py" in elsewhere
    for path in elsewhere:
        change(path)
    assert source_now() == before
    for path in core.joinpath("compute").rglob("*.*"):
        change(path)
        assert source_now() != before, f"{path.name} enters programs"
        before = source_now()
