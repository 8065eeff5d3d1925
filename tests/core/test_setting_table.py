"""A setting is written down once: flags, checks, files, keys and sweeps follow from its field."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tpuvid
from tpuvid.compute.kernels.placement import ATTENTION_BACKENDS
from tpuvid.contract import Conditioning, GenerationConfig
from tpuvid.contract.options import OPTIONS, Options
from tpuvid.contract.settings import EMBEDDED, SETTINGS
from tpuvid.contract.stages import STAGES
from tpuvid.errors import InputError

NEW = """
    eta: float = setting(
        0.0, help="Noise anew.", range=(0, 1), old_names=("fresh_noise",), enters=("denoise",), programs=True
    )
"""
FOLLOWS = """
from dataclasses import replace

from tpuvid.cli.main import cli
from tpuvid.compute.packs.fit import FLAGS, mismatch
from tpuvid.compute.run_key import CONCERNS
from tpuvid.contract import GenerationConfig
from tpuvid.contract.options import Options
from tpuvid.contract.parser import parse_settings
from tpuvid.contract.settings import check_sampling
from tpuvid.errors import InputError
from tpuvid.runs.asked.items import parse_sweep
from tpuvid.runs.kept.identity import VIEWS, RunIdentity

flags = {name: {flag for p in command.params for flag in p.opts} for name, command in cli.commands.items()}
print("flags", *(name for name, has in flags.items() if "--eta" in has))

config = GenerationConfig(height=16, width=16, num_frames=1, fps=8, num_inference_steps=2, guidance_scale=1.0, eta=0.5)
check_sampling(config)
try:
    check_sampling(replace(config, eta=2.0))
except InputError as error:
    print("check", error)
print("stage file", parse_settings({"eta": "0.25"}, "f"), parse_settings({"fresh_noise": "0.25"}, "f"))
print("sweep", parse_sweep(["eta=0,0.5"]))
print("programs", config.programs_key()["eta"], CONCERNS["eta"], "eta" in FLAGS)
print("pack", mismatch({"eta": 0.0}, {"eta": 0.5}))
other = replace(config, eta=0.0)
run = RunIdentity(model_id="m", checkpoint=None, fingerprint="f", loras=[], others={}, options=Options())
print("keys", *(kind for kind in VIEWS if run.key(kind, config) != run.key(kind, other)))
print("batch", config.batch_key() != other.batch_key())
"""


def test_a_setting_is_added_in_one_place(tmp_path):
    copy = tmp_path / "tpuvid"
    shutil.copytree(Path(tpuvid.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "contract" / "settings.py"
    before, field, after = table.read_text("utf-8").partition("\n    max_sequence_length: int")
    table.write_text(before + NEW + field + after, "utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FOLLOWS], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "flags generate denoise compile plan",
        "check eta=2.0: needs a number from 0 to 1",
        "stage file {'eta': 0.25} {'eta': 0.25}",
        "sweep {'eta': [0.0, 0.5]}",
        "programs 0.5 ('denoise',) True",
        "pack eta=0.0, this run has eta=0.5; pass --eta 0.0, or make a pack for this run with tpuvid compile",
        "keys request folder latents denoising",
        "batch True",
    ]


@pytest.mark.parametrize("kind, table", [(GenerationConfig, SETTINGS), (Options, OPTIONS)])
def test_every_field_has_its_entry(kind, table):
    assert list(table) == [f.name for f in fields(kind)]
    for each in table.values():
        assert set(each.enters) <= set(STAGES) and (each.enters or kind is Options)
        assert not each.range or not each.choices


def test_what_embeddings_depend_on_passes_with_them():
    assert set(EMBEDDED) <= {f.name for f in fields(Conditioning)}


def test_every_attention_backend_can_be_chosen():
    assert set(OPTIONS["attention_backend"].choices) == {"auto", *ATTENTION_BACKENDS}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(attention_backend="fast"), "attention_backend='fast': choose from auto, xla"),
        (dict(vae_tiling="yes"), "vae_tiling='yes': needs true or false"),
        (dict(warmup_steps=True), "warmup_steps=True: needs a whole number ≥ 0"),
        (dict(mesh="dp"), "mesh='dp': needs the form"),
        (dict(lora_scale="1"), "lora_scale='1': needs a number"),
    ],
)
def test_options_that_no_machine_could_run_with_are_refused(options, message):
    with pytest.raises(InputError) as error:
        Options(**options).check()
    assert message in str(error.value)
