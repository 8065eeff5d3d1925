"""Which attention runs: the TPU's kernel inside `shard_map`, the GPU's cuDNN, or XLA; by where the program will run."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float

from tpuvid.compute.kernels.block_sizes import device_chip
from tpuvid.compute.kernels.flash import attention_flash
from tpuvid.compute.kernels.placement import WINDOWED_BACKENDS, Placement, placement
from tpuvid.compute.kernels.splash import attention_splash
from tpuvid.compute.kernels.window import Band
from tpuvid.compute.kernels.xla import attention_xla, attention_xla_windowed


def attention(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | Float[Array, "#B #N #T #S"] | None = None,
    band: Band | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """Scaled dot-product attention on the devices of the enclosing `placed_on`; see `attention_reference`.

    The kernels take masks over keys ([B, 1, 1, S], boolean); any other mask goes to XLA, which never builds T×S scores, also
    where a kernel was asked for: a text encoder has such masks, and runs with the denoiser's settings. With a `band`, masks
    are over keys alone, and our own kernel runs, or XLA; raises `ValueError` for other backends.
    """
    place = placement()
    backend = _choose(place, query, mask, band)
    if backend == "xla" and band is None:
        return attention_xla(query, key, value, mask=mask, scale=scale)
    kv_mask = None if mask is None else jnp.broadcast_to(mask[:, 0, 0], (len(key), key.shape[2]))
    if backend in ("cudnn", "xla") or place.is_local:
        return local_attention(query, key, value, kv_mask, band, scale)
    return _attention_sharded(place.mesh, query, key, value, kv_mask, band, scale)


def local_attention(
    query: Float[Array, "B N T D"],
    key: Float[Array, "B N S D"],
    value: Float[Array, "B N S D"],
    kv_mask: Bool[Array, "B S"] | None = None,
    band: Band | None = None,
    scale: float | None = None,
) -> Float[Array, "B N T D"]:
    """Attention among what each device has: outside of `shard_map` for one device, and for what XLA partitions by itself."""
    place = placement()
    mask = None if kv_mask is None else kv_mask[:, None, None]
    match _choose(place, query, mask, band):
        case "flash" | "flash-smooth-k" | "flash-int8" as backend:
            device = jax.devices()[0] if place.mesh is None else place.mesh.devices.flat[0]
            chip = device_chip(device, query.dtype)
            return attention_flash(
                query, key, value, kv_mask=kv_mask, band=band, scale=scale, chip=chip,
                smooth_k=backend != "flash", int8=backend == "flash-int8",
            )  # fmt: skip
        case "splash":
            return attention_splash(query, key, value, kv_mask=kv_mask, scale=scale)
        case "cudnn":
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # it wants [B, T, N, D]
            out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
            return jnp.swapaxes(out, 1, 2)
    if band is not None:
        return attention_xla_windowed(query, key, value, band, kv_mask=kv_mask, scale=scale)
    return attention_xla(query, key, value, mask=mask, scale=scale)


def _is_key_mask(mask: Array) -> bool:
    return mask.dtype == bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def _choose(place: Placement, query: Array, mask: Array | None, band: Band | None = None) -> str:
    if mask is not None and not _is_key_mask(mask):
        return "xla"
    if band is not None:
        if place.attention_backend not in WINDOWED_BACKENDS:
            raise ValueError(
                f"attention backend {place.attention_backend!r} has no windows; use {', '.join(WINDOWED_BACKENDS)}"
            )
        if place.platform != "tpu":
            return "xla"
    if place.attention_backend != "auto":
        return place.attention_backend
    match place.platform:
        case "tpu":
            return "flash"
        case "gpu" if query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128:  # what cuDNN's kernel takes
            return "cudnn"
    return "xla"


def _attention_sharded(mesh: Mesh | None, query, key, value, kv_mask, band, scale):
    """The TPU kernel on every device: batch over dp; over tp the heads, or else the queries, or else nothing."""
    if mesh is None or mesh.size == 1:
        return local_attention(query, key, value, kv_mask, band, scale)
    batch, heads, queries, _ = query.shape
    dp = "dp" if batch % mesh.shape["dp"] == 0 else None
    rows_divide = queries % mesh.shape["tp"] == 0 and band is None  # with a band, where a query stands matters
    head, row = ("tp", None) if heads % mesh.shape["tp"] == 0 else (None, "tp" if rows_divide else None)
    q_spec, kv_spec = PartitionSpec(dp, head, row, None), PartitionSpec(dp, head, None, None)
    mask_spec = None if kv_mask is None else PartitionSpec(dp, None)
    run = partial(local_attention, band=band, scale=scale)
    specs = (q_spec, kv_spec, kv_spec, mask_spec)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=q_spec, check_vma=False)(query, key, value, kv_mask)
