from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tpuvid.compute.mesh import default_mesh_config, layout_of, make_mesh, shard_parameters, split_sizes
from tpuvid.contract import MeshConfig
from tpuvid.errors import InputError


@pytest.mark.parametrize(
    "text, config",
    [
        ("dp=2,tp=4", dict(dp=2, tp=4)),
        ("tp=8", dict(tp=8)),
        ("dp=2", dict(dp=2)),
        ("dp=1, tp=2", dict(tp=2)),
        ("tp=2,dp=2", dict(dp=2, tp=2)),
        ("dp=2,sp=4", dict(dp=2, sp=4)),
        ("sp=4,fsdp", dict(sp=4, fsdp=True)),
        ("dp=2,sp=4,replicated", dict(dp=2, sp=4, fsdp=False)),
    ],
)
def test_parse(text, config):
    assert MeshConfig.parse(text) == MeshConfig(**config) == MeshConfig.parse(str(MeshConfig(**config)))


@pytest.mark.parametrize("text", ["", ",", "tp", "tp=0", "dp=-1", "ep=2", "dp=2;tp=4", "dp=2,dp=2", "fsdp", "fsdp,sp=4"])
def test_parse_refuses(text):
    with pytest.raises(InputError, match="needs the form dp=2,sp=4"):
        MeshConfig.parse(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("sp=2,tp=2", "choose one of them"),
        ("dp=2,tp=2,fsdp", "fsdp is about layouts that split tokens"),
        ("dp=2,replicated", "add sp=N"),
    ],
)
def test_what_can_not_be_combined_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        MeshConfig.parse(text)


def test_a_plugins_own_mesh_is_no_layout_of_ours(mesh):
    assert layout_of(SimpleNamespace(mesh=mesh)) is None and layout_of(SimpleNamespace()) is None
    stage = SimpleNamespace(mesh=Mesh(mesh.devices.reshape(2, 4, 1), ("dp", "sp", "tp")), traced=SimpleNamespace(fsdp=True))
    assert str(layout_of(stage)) == "dp=2,sp=4,fsdp"


@pytest.mark.parametrize(
    "devices, guidance, config", [(8, True, (2, 4)), (8, False, (1, 8)), (1, True, (1, 1)), (3, True, (1, 3))]
)
def test_tokens_are_split_over_all_that_guidance_leaves(devices, guidance, config):
    assert default_mesh_config(devices, [7], guidance=guidance, tokens=True) == MeshConfig(dp=config[0], sp=config[1])


@pytest.mark.parametrize(
    "devices, sizes, guidance, config",
    [(1, [12], True, (1, 1)), (8, [40], True, (2, 4)), (8, [40], False, (1, 8)), (8, [12, 96], True, (2, 4)),
     (8, [12, 90], True, (2, 2)), (4, [5], True, (2, 1)), (3, [12], True, (1, 3))],
)  # fmt: skip
def test_default_divides_every_size(devices, sizes, guidance, config):
    assert default_mesh_config(devices, sizes, guidance=guidance) == MeshConfig(dp=config[0], tp=config[1])


def test_split_sizes_are_those_of_the_rules():
    parameters = {"blocks.*.q.weight": struct(3, 8, 5), "blocks.*.o.weight": struct(3, 5, 12), "head.weight": struct(7, 7)}
    rules = [(r".*\.q\.weight", ("tp", None)), (r".*\.o\.weight", (None, "tp"))]
    assert split_sizes(parameters, rules) == {8, 12}


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="needs 64 devices; there"):
        make_mesh(MeshConfig(dp=8, tp=8))


@pytest.fixture
def mesh():
    """Two by four positions of one device: enough to place, not to run."""
    return Mesh(np.array([jax.devices()[0]] * 8).reshape(2, 4), ("dp", "tp"))


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_rules_apply_to_the_last_dimensions(mesh):
    parameters = {"blocks.*.q.weight": struct(3, 8, 5), "head.weight": struct(8, 8)}
    found = shard_parameters(parameters, [(r"blocks\.\*\.q\.weight", ("tp", None))], mesh)
    assert tuple(found["blocks.*.q.weight"].spec) == (None, "tp", None)
    assert tuple(found["head.weight"].spec) == ()


def test_a_rule_that_matches_nothing_is_an_error(mesh):
    with pytest.raises(ValueError, match="match no parameter.*qq"):
        shard_parameters({"q": struct(8)}, [("qq", ("tp",))], mesh)


def test_a_mesh_that_does_not_divide_is_an_error(mesh):
    with pytest.raises(InputError, match=r"mesh tp=4 does not divide q \(6,\)"):
        shard_parameters({"q": struct(6)}, [("q", ("tp",))], mesh)


def test_fsdp_splits_the_longest_dimension_of_blocks_that_divides(mesh):
    mesh = Mesh(mesh.devices.reshape(2, 4, 1), ("dp", "sp", "tp"))
    parameters = {
        "blocks.*.a": struct(3, 8, 24),
        "blocks.*.b": struct(3, 16, 9),
        "blocks.*.c": struct(3, 7),
        "head": struct(8, 8),
    }
    found = shard_parameters(parameters, [], mesh, fsdp=True)
    specs = {name: tuple(sharding.spec) for name, sharding in found.items()}
    both = ("dp", "sp")
    assert specs == {"blocks.*.a": (None, None, both), "blocks.*.b": (None, both), "blocks.*.c": (), "head": ()}
