"""Which attention runs: the TPU's kernel inside `shard_map`, the GPU's cuDNN, or XLA; by where the program will run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float

from tpuvid.kernels.splash import attention_splash
from tpuvid.kernels.xla import attention_xla

BACKENDS = {"auto": "any platform", "xla": "any platform", "splash": "tpu", "cudnn": "gpu"}

_placement: ContextVar[tuple[Mesh | None, str]] = ContextVar("placement", default=(None, "auto"))


@contextmanager
def attention_backend(mesh: Mesh, backend: str = "auto") -> Iterator[None]:
    """Within it, `attention` is traced for the devices of `mesh`; raises `ValueError` where `backend` can't run there."""
    platform = _platform(mesh)
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not known; choose from {', '.join(BACKENDS)}")
    if BACKENDS[backend] not in ("any platform", platform):
        raise ValueError(f"attention backend {backend!r} runs on {BACKENDS[backend]}, these devices are {platform}; use auto")
    token = _placement.set((mesh, backend))
    try:
        yield
    finally:
        _placement.reset(token)


def attention(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """Scaled dot-product attention on the devices of the enclosing `attention_backend`; see `attention_reference`.

    The kernels take masks over keys ([B, 1, 1, S], boolean); any other mask goes to XLA, which never builds T×S scores.
    """
    mesh, backend = _placement.get()
    if backend == "auto":
        backend = _choose(mesh, query, mask)
    if backend == "xla":
        return attention_xla(query, key, value, mask=mask, scale=scale)
    if mask is not None and not _is_key_mask(mask):
        raise ValueError(f"attention backend {backend!r} takes masks [B, 1, 1, S], not {mask.dtype} {mask.shape}; use auto")
    if backend == "cudnn":
        return _attention_cudnn(query, key, value, mask, scale)
    return _attention_sharded(mesh, query, key, value, mask, scale)


def _platform(mesh: Mesh | None) -> str:
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def _is_key_mask(mask: Array) -> bool:
    return mask.dtype == bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def _choose(mesh: Mesh | None, query: Array, mask: Array | None) -> str:
    if mask is not None and not _is_key_mask(mask):
        return "xla"
    match _platform(mesh):
        case "tpu":
            return "splash"
        case "gpu" if query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128:  # what cuDNN's kernel takes
            return "cudnn"
    return "xla"


def _attention_cudnn(query, key, value, mask, scale):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # it wants [B, T, N, D]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return jnp.swapaxes(out, 1, 2)


def _attention_sharded(mesh: Mesh | None, query, key, value, mask, scale):
    """The TPU kernel on every device: batch over dp; over tp the heads, or else the queries, or else nothing."""
    kernel = partial(attention_splash, scale=scale)
    kv_mask = None if mask is None else mask[:, 0, 0]
    if mesh is None or mesh.size == 1:
        return kernel(query, key, value, kv_mask=kv_mask)
    batch, heads, queries, _ = query.shape
    dp = "dp" if batch % mesh.shape["dp"] == 0 else None
    head, row = ("tp", None) if heads % mesh.shape["tp"] == 0 else (None, "tp" if queries % mesh.shape["tp"] == 0 else None)
    q_spec, kv_spec = PartitionSpec(dp, head, row, None), PartitionSpec(dp, head, None, None)
    if kv_mask is None:
        run, specs, args = kernel, (q_spec, kv_spec, kv_spec), (query, key, value)
    else:
        kv_mask = jnp.broadcast_to(kv_mask, (batch, key.shape[2]))
        run, specs = lambda q, k, v, m: kernel(q, k, v, kv_mask=m), (q_spec, kv_spec, kv_spec, PartitionSpec(dp, None))
        args = (query, key, value, kv_mask)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)(*args)
