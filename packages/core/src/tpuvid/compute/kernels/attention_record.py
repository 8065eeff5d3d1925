"""Which shapes the TPU's attention kernel is called with: seen while a program is traced, nothing needs to run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tpuvid.compute.kernels.block_sizes import AttentionShape

_record: ContextVar[list[AttentionShape] | None] = ContextVar("record", default=None)


@contextmanager
def recorded_attention() -> Iterator[list[AttentionShape]]:
    """Within it, each call of the flash kernel that is traced adds its shape on one device to the list, in order.

    A function that jax has traced before with the same arguments isn't traced again, and then leaves nothing; the body of
    a `scan` is one call however often it runs.
    """
    calls: list[AttentionShape] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def record_attention(shape: AttentionShape) -> None:
    calls = _record.get()
    if calls is not None:
        calls.append(shape)
