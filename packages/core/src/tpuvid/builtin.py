"""tpuvid-core's own plugin: what it registers as any package would."""

from tpuvid.hookspecs import hookimpl
from tpuvid.stepcache import DeepCache


@hookimpl
def tpuvid_step_caches():
    return [DeepCache]
