"""Prompts from files, several videos of each, and sweeps."""

import io

import pytest
from tpuvid.errors import InputError
from tpuvid.runs.asked.items import Item, parse_sweep, several, swept
from tpuvid.runs.asked.names import slug
from tpuvid.runs.asked.prompts import read_prompts


def prompts(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return read_prompts(str(path))


def test_a_line_of_text_is_a_prompt(tmp_path):
    items = prompts(tmp_path, "p.txt", "\ufeffa cat, purring\n\n  a dog  \n# 1\n")
    assert [item.settings for item in items] == [{"prompt": "a cat, purring"}, {"prompt": "a dog"}, {"prompt": "# 1"}]
    assert items[1].where.endswith("p.txt, line 3")


def test_csv_gives_settings_by_their_names(tmp_path):
    heads = "prompt,seed,guidance-scale,steps,negative_prompt,use_dynamic_cfg,output\n"
    text = heads + '"a cat, purring",7,3.5,20,"",True,cat.mp4\na dog,,,,blurry,,\n'
    cat, dog = prompts(tmp_path, "p.csv", text)
    assert cat.settings == {
        "prompt": "a cat, purring", "seed": 7, "guidance_scale": 3.5, "num_inference_steps": 20, "use_dynamic_cfg": True,
    }  # fmt: skip
    assert cat.output == "cat.mp4"
    assert dog.settings == {"prompt": "a dog", "negative_prompt": "blurry"} and dog.output is None


def test_jsonl_gives_settings_with_their_types(tmp_path):
    (item,) = prompts(tmp_path, "p.jsonl", '{"prompt": "a cat", "seed": 7, "height": 64, "cache": null, "flow_shift": "3"}\n\n')
    assert item.settings == {"prompt": "a cat", "seed": 7, "height": 64, "flow_shift": 3.0}


ROWS = [("a cat", {"seed": 7}), ("a dog", {})]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.tsv", "prompt\tseed\na cat\t7\na dog\t\n"),
        ("p.json", '[{"prompt": "a cat", "seed": 7}, "a dog"]'),
        ("p.yaml", "- prompt: a cat\n  seed: 07\n- a dog\n"),
        ("p.yml", "- {prompt: a cat, seed: 7}\n- 'a dog '\n"),
        ("p.ndjson", '{"prompt": " a cat", "seed": 7}\n{"prompt": "a dog"}'),
    ],
)
def test_other_kinds_of_files_say_the_same(tmp_path, monkeypatch, name, text):
    piped_too = "- {" not in text  # which might be text
    for items in (prompts(tmp_path, name, text), *([piped(monkeypatch, text)] if piped_too else [])):
        assert [(item.settings["prompt"], {k: v for k, v in item.settings.items() if k != "prompt"}) for item in items] == ROWS


def piped(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return read_prompts("-")


@pytest.mark.parametrize("text", ['{"prompt": "a cat", "seed": 7}', "prompt: a cat\nseed: 7"])
def test_a_file_of_one(tmp_path, text):
    (item,) = prompts(tmp_path, "p.json" if text[0] == "{" else "p.yaml", text)
    assert item.settings == {"prompt": "a cat", "seed": 7}


@pytest.mark.parametrize("text", ["[a cat] on a mat", "a prompt, with commas", "- a cat", "12:30"])
def test_text_on_stdin_stays_text(monkeypatch, text):
    assert [item.settings for item in piped(monkeypatch, text)] == [{"prompt": text}]


@pytest.mark.parametrize("end", ["\u2028", "\v", "\x85", "\f"])
def test_only_the_end_of_a_line_ends_a_row(tmp_path, end):
    (item,) = prompts(tmp_path, "p.csv", f"prompt,seed\r\na{end}cat,7\r\n")
    assert item.settings == {"prompt": f"a{end}cat", "seed": 7}
    (item,) = prompts(tmp_path, "p.txt", f"a{end}cat\n")
    assert item.settings == {"prompt": f"a{end}cat"}


@pytest.mark.parametrize("text, seed", [("a cat\na dog", None), ('{"prompt": "a cat", "seed": 1}\n{"prompt": "a dog"}', 1)])
def test_stdin_is_text_or_jsonl(monkeypatch, text, seed):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    items = read_prompts("-")
    assert [item.settings["prompt"] for item in items] == ["a cat", "a dog"] and items[0].settings.get("seed") == seed


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("p.txt", " \n", "holds no prompt"),
        ("p.csv", "prompt,sed\na,1\n", "line 2: 'sed' is no setting; did you mean seed?"),
        ("p.csv", "prompt,seed\na,many\n", "line 2: seed='many' is no int"),
        ("p.csv", "prompt,seed\na,1,2\n", "line 2: has not as many cells as the heading"),
        ("p.csv", "prompt,seed\na\n", "line 2: has not as many cells as the heading"),
        ("p.csv", "seed\n1\n", "line 2: has no prompt"),
        ("p.csv", "prompt,seed\n ,1\n", "line 2: has no prompt"),
        ("p.csv", 'prompt\n"a\n', "is no CSV"),
        ("p.csv", "prompt,steps,num-inference-steps\na,1,2\n", "line 2: gives a setting twice"),
        ("p.csv", "prompt,output\na,../x.mp4\n", "output='../x.mp4': needs the plain name"),
        ("p.csv", "prompt,output\na,.hidden\n", "needs the plain name"),
        ("p.jsonl", '{"prompt": "a"}\nb\n', "line 2: is no JSON"),
        ("p.jsonl", '["a"]\n', "line 1: is no JSON object"),
        ("p.jsonl", '{"prompt": ["a"]}\n', "line 1: has no prompt"),
        ("p.jsonl", "[" * 100_000, "line 1: is no JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1: gives 'seed' twice"),
        ("p.yaml", "- prompt: a\n  prompt: b\n", "gives 'prompt' twice"),
        ("p.json", '["a", 3]', "entry 2: is '3'; needs a prompt in quotes"),
        ("p.json", '{"prompt": "a", "sed": 3}', "'sed' is no setting; did you mean seed?"),
        ("p.docx", "a", "prompts come as .txt, .csv, .tsv"),
        ("prompts", "a", "prompts come as .txt, .csv, .tsv"),
    ],
)
def test_lines_that_make_no_sense_are_named(tmp_path, name, text, says):
    with pytest.raises(InputError) as error:
        prompts(tmp_path, name, text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "p.txt", tmp_path, tmp_path / "none.csv"):
        with pytest.raises(InputError, match="can't be read"):
            read_prompts(str(path))


def test_several_videos_have_seeds_that_follow_one_another():
    items = [Item({"prompt": "a"}), Item({"prompt": "b", "seed": 7}, output="b.mp4"), Item({"prompt": "c", "seed": -1})]
    found = several(items, 2, seed=42)
    assert [item.settings["seed"] for item in found] == [42, 43, 7, 8, -1, -1]
    assert [item.output for item in found] == [None, None, "b.mp4", "b_2.mp4", None, None]
    assert several(items, 1, seed=42) == items


def test_a_sweep_is_every_combination():
    axes = parse_sweep(["seed=0..2", "guidance-scale=4,5.5", "cache=deepcache"])
    assert axes == {"seed": [0, 1, 2], "guidance_scale": [4.0, 5.5], "cache": ["deepcache"]}
    found = swept([Item({"prompt": "a", "seed": 9})], axes)
    assert len(found) == 6 and found[1].settings == {"prompt": "a", "seed": 0, "guidance_scale": 5.5, "cache": "deepcache"}
    assert found[1].swept == {"seed": 0, "guidance_scale": 5.5, "cache": "deepcache"}
    assert parse_sweep(["seed=1..2,7"]) == {"seed": [1, 2, 7]} and swept([], {}) == []


@pytest.mark.parametrize(
    "words, says",
    [
        (["seed"], "needs a setting and its values"),
        (["seed="], "needs a setting and its values"),
        (["sed=1"], "did you mean seed?"),
        (["prompt=a,b"], "'prompt' is no setting"),
        (["seed=1,,2"], "is empty or given twice"),
        (["seed=1,1"], "is empty or given twice"),
        (["seed=1", "seed=2"], "given twice"),
        (["seed=3..1"], "smaller end first"),
        (["seed=0..999999999"], "values or fewer"),
        (["seed=x"], "seed='x' is no int"),
        (["seed=0..9999", "fps=1..100"], "1000000 combinations"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(words, says):
    with pytest.raises(InputError) as error:
        parse_sweep(words)
    assert says in str(error.value)


def test_a_sweep_leaves_no_room_for_names():
    with pytest.raises(InputError, match="a sweep makes many"):
        swept([Item({"prompt": "a"}, output="a.mp4")], {"seed": [1]})


def test_file_names_come_from_prompts_safely():
    assert slug("../../etc/passwd; rm -rf $HOME\0") == "etc-passwd-rm-rf-home"
    assert slug("猫") == "video" and len(slug("x" * 1000)) == 60
