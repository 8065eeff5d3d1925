"""Which attention runs: the TPU's kernel inside `shard_map`, the GPU's cuDNN, or XLA; by where the program will run."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float

from tpuvid.kernels.block_sizes import device_chip
from tpuvid.kernels.placement import Placement, placement
from tpuvid.kernels.flash import attention_flash
from tpuvid.kernels.splash import attention_splash
from tpuvid.kernels.xla import attention_xla


def attention(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """Scaled dot-product attention on the devices of the enclosing `placed_on`; see `attention_reference`.

    The kernels take masks over keys ([B, 1, 1, S], boolean); any other mask goes to XLA, which never builds T×S scores.
    """
    place = placement()
    backend = _choose(place, query, mask) if place.attention_backend == "auto" else place.attention_backend
    if backend == "xla":
        return attention_xla(query, key, value, mask=mask, scale=scale)
    if mask is not None and not _is_key_mask(mask):
        raise ValueError(f"attention backend {backend!r} takes masks [B, 1, 1, S], not {mask.dtype} {mask.shape}; use auto")
    if backend == "cudnn":
        return _attention_cudnn(query, key, value, mask, scale)
    return _attention_sharded(backend, place.mesh, query, key, value, mask, scale)


def _is_key_mask(mask: Array) -> bool:
    return mask.dtype == bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def _choose(place: Placement, query: Array, mask: Array | None) -> str:
    if mask is not None and not _is_key_mask(mask):
        return "xla"
    match place.platform:
        case "tpu":
            return "flash"
        case "gpu" if query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128:  # what cuDNN's kernel takes
            return "cudnn"
    return "xla"


def _attention_cudnn(query, key, value, mask, scale):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # it wants [B, T, N, D]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return jnp.swapaxes(out, 1, 2)


def _attention_sharded(backend: str, mesh: Mesh | None, query, key, value, mask, scale):
    """The TPU kernel on every device: batch over dp; over tp the heads, or else the queries, or else nothing."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if backend == "splash":
        kernel = partial(attention_splash, scale=scale)
    else:
        kernel = partial(attention_flash, scale=scale, chip=device_chip(device, query.dtype))
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
