"""The search for tile sizes: with a made-up kernel, and once with the real one for a real chip."""

import json
import subprocess

import pytest
from tpuvid.compute.kernels.block_sizes import LANES, VARIABLE, AttentionShape, Blocks, flash_blocks, read_rows
from tpuvid.errors import InputError, TpuvidError
from tpuvid.plan import tune
from tpuvid.plan.topologies import parse_topology

V6E = parse_topology("v6e-8")
SHAPE = AttentionShape(5, 75600, 75600, 128)


def made_up(topology, shape, candidates, jobs):
    """Best at 1536/1536/512; more than 4096 queries do not fit."""
    for blocks in candidates:
        cost = sum(abs(size - best) / best for size, best in zip(blocks, (1536, 1536, 512), strict=True))
        yield tune.Found(blocks, None, "too large") if blocks.q > 4096 else tune.Found(blocks, 1e7 * (1 + cost))


@pytest.fixture
def journal(tmp_path):
    return lambda shape=SHAPE: tune.Journal(tmp_path / "journal.jsonl", {"shape": list(shape)})


def look(journal, evaluate=made_up, limit=60, lines=None):
    return tune.search(SHAPE, journal, V6E, 2, limit, (lines if lines is not None else []).append, evaluate)


def test_the_search_descends_from_the_coarse_candidates(journal):
    assert look(journal()).blocks == (1536, 1536, 512)


@pytest.mark.parametrize("limit", [1, 5, 9])
def test_the_search_keeps_to_its_limit(journal, limit):
    lines = []
    look(journal(), limit=limit, lines=lines)
    assert len(lines) == limit and lines[-1].startswith(f"[{limit}/{limit}]") and "best" in lines[-1]


def test_a_search_goes_on_where_it_was_interrupted(journal):
    asked = []

    def evaluate(topology, shape, candidates, jobs):
        for found in made_up(topology, shape, candidates, jobs):
            if len(asked) == 9:
                raise KeyboardInterrupt
            asked.append(found.blocks)
            yield found

    lines = []
    with pytest.raises(KeyboardInterrupt):
        look(journal(), evaluate, lines=lines)
    assert "goes on from there" in lines[-1]
    kept = journal().found
    assert 1 <= len(kept) <= 9
    with journal().path.open("a") as file:
        file.write('{"key": ')  # as a crash would leave it
    again = []
    found = look(journal(), lambda *args: again.extend(args[2]) or made_up(*args))
    assert not set(again) & set(kept) and found == look(journal(), lambda *_: pytest.fail("all is known"))
    assert not journal(SHAPE._replace(heads=4)).found, "another shape's"


def test_no_candidate_fits(journal):
    with pytest.raises(TpuvidError, match="none of 3 candidates compiles"):
        look(journal(), lambda _, __, candidates, ___: (tune.Found(b, None, "too large") for b in candidates), limit=3)


@pytest.mark.parametrize("queries, keys", [(75600, 75600), (1, 1), (100, 3000), (32760, 32760)])
@pytest.mark.parametrize("sizes", [*tune.COARSE, (5000, 700, 3000)])
def test_candidates_are_whole_tiles_without_needless_padding(queries, keys, sizes):
    q, kv, compute = tune.fit(SHAPE._replace(queries=queries, keys=keys), *sizes)
    assert q % 128 == kv % 128 == compute % 128 == 0 and kv % compute == 0
    blocks = -(-queries // q)
    assert blocks * q - queries < 2 * LANES * blocks and q % 256 == 0
    assert kv < keys + compute and compute < keys + LANES


def tuned(tmp_path, monkeypatch, shapes=(SHAPE,), **options):
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "require_libtpu", lambda: None)
    monkeypatch.setattr(tune, "version", lambda name: "0")
    monkeypatch.setattr(tune, "compile_candidates", made_up)
    return tune.tune_attention(shapes, V6E, command="tpuvid tune", output=tmp_path / "rows.json", **options)


def test_rows_take_the_place_of_those_of_the_same_shape(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    other = SHAPE._replace(heads=6)
    tuned(tmp_path, monkeypatch, [SHAPE, other], max_candidates=1)
    (row,) = tuned(tmp_path, monkeypatch, max_candidates=30)
    assert read_rows(path)[0] == row and [r.shape for r in read_rows(path)] == [SHAPE, other]
    assert row.chip == "TPU v6 lite" and row.predicted_ms == pytest.approx(look_again(row) / 1.75e6, abs=1e-3)
    monkeypatch.setenv(VARIABLE, str(path))
    assert flash_blocks(*SHAPE[1:4], chip=row.chip) == row.blocks


def look_again(row):
    (found,) = made_up(V6E, row.shape, [row.blocks], 1)
    return found.cycles


def test_what_can_not_be_written_is_refused_before_the_search(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("[1]")
    with pytest.raises(InputError, match="is no table"):
        tuned(tmp_path, monkeypatch)
    (tmp_path / "rows.json").unlink()
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        tuned(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["v5e-8", "v5p-8", "tpu7x-8"])
def test_chips_without_times_are_refused(name):
    with pytest.raises(InputError, match="no times for"):
        tune.check_tunable(parse_topology(name))


@pytest.mark.aot
def test_real_candidates(tmp_path, tpuvid_command, python_env):
    environment = python_env | {"TPUVID_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    output = tmp_path / "rows.json"
    shape = ["--heads", "2", "--queries", "4000", "--keys", "3000", "--head-dim", "64"]
    command = [tpuvid_command, "tune", "attention", *shape, "--topology", "v6e-8", "--max-candidates", "2", "--json"]
    done = [
        subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True) for _ in range(2)
    ]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    assert done[0].stdout == done[1].stdout and "[2/2]" in done[0].stderr
    assert len((tmp_path / "cache" / "tune" / "attention-v6e.jsonl").read_text().splitlines()) == 2, "none was compiled twice"
    (row,) = read_rows(output)
    assert json.loads(done[0].stdout) == [row._asdict()]
    # two heads of 2 × 2 × 4000 × 3000 × 64 FLOP take 0.007 ms at the peak of 918 TFLOP/s, half of which D = 64 can't use
    assert 0.014 < row.predicted_ms < 0.3
    (too_large,) = tune.compile_candidates(V6E, AttentionShape(1, 8192, 4096, 512), [Blocks(8192, 1024, 1024)], 1)
    assert too_large.cycles is None and "RESOURCE_EXHAUSTED" in too_large.reason
    assert not list(tmp_path.glob("tpuvid-job-*")), "no dumps are left"
