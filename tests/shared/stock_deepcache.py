"""DeepCache put around a stock diffusers transformer by hooks: what tpuvid's own is tested against."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from tpuvid.compute.step_caches import step_cache
from tpuvid.contract import GenerationConfig


@contextmanager
def deepcached(
    transformer: nn.Module, blocks: nn.ModuleList, config: GenerationConfig, *, carries: tuple[str, ...], calls: int
) -> Iterator[None]:
    """Within it, calls of `transformer` follow `config`'s cache, if it has one.

    `carries` are a block's first arguments, which are also what it returns; the pipeline calls the transformer `calls`
    times a step.
    """
    if config.cache is None:
        yield
        return
    full = step_cache(config).full_steps(config.num_inference_steps)
    forward, count, kept = transformer.forward, 0, {}

    def carried(args, kwargs):
        return tuple(kwargs[name] if name in kwargs else args[i] for i, name in enumerate(carries))

    def patched(*args, **kwargs):
        nonlocal count
        step, branch = divmod(count, calls)
        count += 1

        def keep_or_replace(block, args, kwargs):
            if full[step]:
                kept[branch] = carried(args, kwargs)
                return args, kwargs
            others = {name: value for name, value in kwargs.items() if name not in carries}
            return (*kept[branch], *args[len(carries) :]), others

        def skip(block, args, kwargs, output):
            values = carried(args, kwargs)
            return values if len(values) > 1 else values[0]

        hooks = [blocks[-1].register_forward_pre_hook(keep_or_replace, with_kwargs=True)]
        if not full[step]:
            hooks += [block.register_forward_hook(skip, with_kwargs=True) for block in blocks[:-1]]
        try:
            return forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    transformer.forward = patched
    try:
        yield
    finally:
        del transformer.forward
    assert count == calls * len(full), "the pipeline calls its transformer another number of times"
