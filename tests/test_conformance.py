"""Our own packages pass the suite that others' are held to."""

import pytest
from tpuvid import testing


@pytest.mark.parametrize(
    "package",
    [
        "tpuvid-wan",
        pytest.param("tpuvid-tiny", marks=pytest.mark.slow),
        pytest.param("tpuvid-cogvideox", marks=pytest.mark.slow),
        pytest.param("tpuvid-hunyuan", marks=pytest.mark.slow),
    ],
)
def test_our_own_packages_conform(package):
    (sheet,) = testing.check(package)
    assert sheet.passed, sheet.render()
    checked = {result.check for result in sheet.results if result.passed}
    least = {"shapes", "bad input", "rules", "determinism", "staged", "batch", "resume", "step cache", "window", "mesh"}
    assert checked >= least | ({"decoders"} if package == "tpuvid-tiny" else {"parity"})
