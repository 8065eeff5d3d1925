"""The conformance suite that ``tpuvid plugin check`` runs, for a package's own tests too. Imports neither jax nor torch.

from tpuvid import testing

def test_conformance():
    for sheet in testing.check("tpuvid-mymodel"):
        assert sheet.passed, sheet.render()
"""

from tpuvid.testing.runner import check
from tpuvid.testing.sheet import Result, Sheet
from tpuvid.testing.spread import spread

__all__ = ["Result", "Sheet", "check", "spread"]
