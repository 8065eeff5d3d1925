import pytest
from tpuvid import InputError
from tpuvid.plan import topologies
from tpuvid.plan.topologies import check_topology, known_topologies, parse_topology, require_libtpu, slices_of


@pytest.mark.parametrize(
    "text, libtpu, devices",
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-4", "v5e:2x2", 4),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v6e-1", "v6e:1x1", 1),
        ("V6E-8", "v6e:2x4", 8),
        ("v6e-16", "v6e:4x4", 16),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("v6e:4x8", "v6e:4x8", 32),
        ("v6e:1x8", "v6e:1x8", 8),
    ],
)
def test_names_that_users_rent_slices_under(text, libtpu, devices):
    found = parse_topology(text)
    assert (found.libtpu_name, found.devices) == (libtpu, devices)
    assert parse_topology(found.name) == found


@pytest.mark.parametrize(
    "text, message",
    [
        ("v6e-3", "v6e comes as v6e-1, v6e-4, v6e-8"),
        ("v5p-4", "v5p comes as v5p-2, v5p-8"),
        ("v9-8", "is no TPU slice; choose from v5e-1"),
        ("", "is no TPU slice"),
        ("v6e:2", "has 2 dimensions; give one like v6e:2x4"),
        ("v6e:0x4", "has 2 dimensions"),
        ("v5p:2x2", "has 3 dimensions; give one like v5p:2x4x4"),
        ("v5p:2x3x4", "needs whole hosts of 2x2x1"),
        ("v6e:3x3", "needs whole hosts of 2x2 chips"),
        ("v6e:1x300", "256 chips at most"),
    ],
)
def test_other_names_are_refused_with_those_that_exist(text, message):
    with pytest.raises(InputError, match=message):
        parse_topology(text)


def test_every_known_name_is_understood():
    assert all(parse_topology(name).name == name for name in known_topologies())


def test_larger_slices_come_smallest_first():
    assert [t.name for t in slices_of(parse_topology("v6e-4").chip, more_than=4)] == ["v6e-8", "v6e-16"]


def test_hosts_are_no_larger_than_the_slice():
    assert parse_topology("v6e-1").host == (1, 1, 1)
    assert parse_topology("v6e-8").host == (2, 4, 1), "eight chips come as one host too"
    assert parse_topology("v6e-16").host == (2, 2, 1)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tpuvid-core\[tpu\]'"):
        require_libtpu()
    with pytest.raises(InputError, match="libtpu"):
        check_topology("v6e-8")
    check_topology("cpu")


def test_compiling_never_asks_a_cloud_machine():
    environment = parse_topology("v6e-8").environment("--xla_flag=1")
    assert environment["JAX_PLATFORMS"] == "cpu" and environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert environment["LIBTPU_INIT_ARGS"].endswith("--xla_flag=1")
