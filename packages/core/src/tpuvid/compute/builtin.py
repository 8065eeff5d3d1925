"""tpuvid-core's own plugin: what it registers as any package would."""

from tpuvid.compute.step_caches import DeepCache
from tpuvid.contract.hookspecs import hookimpl
from tpuvid.contract.stepcache import StepCache


@hookimpl
def tpuvid_step_caches() -> list[type[StepCache]]:
    return [DeepCache]
