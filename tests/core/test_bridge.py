import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from tpuvid.compute.bridge import environment
from tpuvid.compute.mesh import make_mesh
from tpuvid.contract import MeshConfig
from tpuvid.family import Scan, TracedModule, Weights, build, load_parameters, map_rows

MESH = make_mesh(MeshConfig())


class Block(nn.Module):
    """Two carries and two shared inputs, one of them by keyword."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim)

    def forward(self, hidden, text, shift, scale=None):
        hidden = hidden + torch.tanh(self.mix(self.norm1(hidden))) * scale + shift
        return hidden, text + hidden.mean(dim=1, keepdim=True)


class Model(nn.Module):
    def __init__(self, dim=6, depth=3):
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 4)
        self.head.weight = nn.Parameter(self.embed.weight.T.contiguous())
        self.register_buffer("table", torch.arange(dim) / 10.0, persistent=False)

    def forward(self, x, text):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden, text = block(hidden, text, self.table, scale=0.5)
        return self.head(hidden), {"text": text, "note": "passes through", "none": None}


def load(model, tmp_path, **options):
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    traced = TracedModule(build(Model), scan={"blocks": Scan(2)}, **options)
    params = load_parameters(traced, Weights([tmp_path / "m.safetensors"]), mesh=MESH, dtype=np.dtype(np.float32))
    return traced, params | traced.buffers()


class Slow(nn.Module):
    """Casts, and takes so long to trace that another thread begins meanwhile."""

    def forward(self, x, reference):
        time.sleep(0.05)
        out = torch.zeros_like(x)
        out[:, 1:] = x[:, 1:]
        time.sleep(0.05)
        return out.type_as(reference)


def test_threads_trace_one_after_the_other():
    environment()  # torchax can be imported by it alone
    from torchax.tensor import Tensor
    from torchax.view import NarrowInfo

    traced, x = TracedModule(build(Slow)), jnp.ones((2, 3))

    def trace(_):
        return jax.jit(lambda x: traced.function()({}, x, x))(x)

    stock = Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(trace, range(4)))
    assert (Tensor.type_as, Tensor.__setitem__, NarrowInfo.update_tensor) == stock
    for out in found:
        np.testing.assert_array_equal(out, [[0, 1, 1]] * 2)


def test_scanned_blocks_equal_the_loop(tmp_path):
    torch.manual_seed(0)
    model, x, text = Model().eval(), torch.randn(2, 5, 4), torch.randn(2, 1, 6)
    arrays = jnp.asarray(x.numpy()), jnp.asarray(text.numpy())
    traced, params = load(model, tmp_path)
    expected, rest = model(x, text)
    run = traced.function("forward")
    found, found_rest = run(params, *arrays)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(found_rest["text"], rest["text"].detach(), atol=1e-6)
    assert found_rest["note"] == "passes through" and found_rest["none"] is None
    program = str(jax.make_jaxpr(lambda p, x, t: run(p, x, t)[0])(params, *arrays))
    assert program.count("tanh") == 1 and "scan" in program


def test_parameter_names_are_the_checkpoints(tmp_path):
    traced, params = load(Model(), tmp_path)
    assert params["blocks.*.mix.weight"].shape == (3, 6, 6)
    assert "embed.weight" in params and not any("layer" in name for name in params)
    assert traced.depth("blocks.*.mix.weight") == 3


def test_parts_stay_in_float32():
    traced = TracedModule(build(Model), scan={"blocks": Scan(2)}, keep_in_fp32=("norm1",))
    dtypes = {name: s.dtype for name, s in traced.parameters(np.dtype(ml_dtypes.bfloat16)).items()}
    assert dtypes["blocks.*.norm1.weight"] == np.float32
    assert dtypes["blocks.*.mix.weight"] == ml_dtypes.bfloat16


def test_building_takes_no_memory_but_keeps_buffers():
    module = build(lambda: nn.Sequential(nn.Linear(20_000, 20_000), Model()))
    assert all(p.is_meta for p in module.parameters())
    assert module[1].table.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_tracing_leaves_torch_as_it_was(tmp_path):
    from torchax.tensor import Tensor

    stock, stock_set = Tensor.type_as, Tensor.__setitem__
    traced, params = load(Model(), tmp_path)
    traced.function("forward")(params, jnp.zeros((1, 2, 4)), jnp.zeros((1, 1, 6)))
    assert Tensor.type_as is stock and Tensor.__setitem__ is stock_set
    assert type(torch.zeros(2) + 1) is torch.Tensor
    assert torch.get_default_dtype() == torch.float32


class Ops(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, *args):
        return self.op(*args)


def run_op(op, *args):
    module = Ops(op)
    found = TracedModule(module).function("forward")(
        {}, *(jnp.asarray(a.float().numpy(), jnp.bfloat16 if a.dtype == torch.bfloat16 else None) for a in args)
    )
    return np.asarray(found, np.float32), op(*args).float().numpy()


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("shape, factor", [((2, 3, 4, 5), (2.0, 3.0)), ((1, 2, 3, 4, 5), 2.0)])
def test_nearest_upsampling(mode, shape, factor):
    found, expected = run_op(lambda x: nn.functional.interpolate(x, scale_factor=factor, mode=mode), torch.randn(shape))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "shape, size", [((1, 2, 1, 4, 5), (1, 8, 15)), ((1, 2, 2, 4, 5), torch.Size((8, 4, 10))), ((2, 1, 3), 6)]
)
def test_nearest_upsampling_to_a_size(shape, size):
    found, expected = run_op(lambda x: nn.functional.interpolate(x, size=size), torch.randn(shape))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "options", [dict(scale_factor=2.0, mode="bilinear"), dict(size=(3, 4)), dict(size=(1, 2)), dict(scale_factor=0.5)], ids=str
)
def test_unsupported_interpolation_is_an_error(options):
    with pytest.raises(ValueError, match="is not supported"):
        run_op(lambda x: nn.functional.interpolate(x, **options), torch.randn(1, 1, 2, 2))


class Rotated(nn.Module):
    """Attention as in CogVideoX: norms, then a rotary embedding written over a part of queries and keys."""

    def __init__(self, heads=2, dim=16):
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(heads * dim, heads * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, cos):
        q = self.norm(self.qk(x).unflatten(2, (self.heads, -1)).transpose(1, 2))
        k = self.norm(self.qk(x * 2).unflatten(2, (self.heads, -1)).transpose(1, 2))
        for part in (q, k):
            part[:, :, 5:] = part[:, :, 5:] * cos + part[:, :, 5:].flip(-1)
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch", [1, 2])
def test_slices_are_written_right_under_jit(batch):
    torch.manual_seed(0)
    module, x, cos = Rotated().eval(), torch.randn(batch, 15, 32), torch.randn(10, 16)
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in module.named_parameters()}
    run = jax.jit(TracedModule(module).function("forward"))
    found = run(params, jnp.asarray(x.numpy()), jnp.asarray(cos.numpy()))
    np.testing.assert_allclose(found, module(x, cos).detach(), atol=1e-5)


def write_slices(x):
    x = x.clone()
    x[1:, -2:] = 5.0
    x[..., :2] = x[..., 1:3] + 1
    x[:, 1, 1:] = x[:, 0, 1:]
    x[..., ::2] = x[..., 1::2] * 3
    x[:, 1:2] = x[:, :1]
    x[:, :2][..., 1:3] = 7.0
    return x


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(
    "part", [slice(0, None, 2), slice(1, None, 2), slice(2, None, 3), slice(1, 6, 2), slice(3, 5, 1), slice(5, 6, 4)]
)
def test_strided_slices_are_written_as_torch_does(size, part):
    """Rotary embeddings write even and odd entries: into a fresh tensor, and into one that is read again."""

    def write(x, y):
        fresh, again = torch.empty_like(x), x * 1.0
        fresh[...] = 0.0
        fresh[..., part] = y[..., part] * 2
        again[..., part] = y[..., part] + again[..., part]
        again[:, part] = 3.0
        return torch.cat([fresh, again])

    found, expected = run_op(write, torch.randn(2, size, size), torch.randn(2, size, size))
    assert np.array_equal(found, expected)


def test_every_kind_of_slice_is_written_as_torch_does():
    found, expected = run_op(write_slices, torch.randn(2, 3, 4))
    assert np.array_equal(found, expected)


NORMS = {
    "layer": (lambda x, w, b: nn.functional.layer_norm(x, (4, 48), w.expand(4, 48), b.expand(4, 48), 1e-6), (3, 6, 4, 48), 48),
    "layer, no weights": (lambda x, w, b: nn.functional.layer_norm(x, (48,)), (3, 5, 48), 48),
    "group": (lambda x, w, b: nn.functional.group_norm(x, 4, w, b, 1e-6), (2, 8, 3, 16, 24), 8),
    "group, no weights": (lambda x, w, b: nn.functional.group_norm(x, 2), (2, 8, 5), 8),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_take_their_statistics_in_float32(norm, dtype):
    """A mean far from zero, which bfloat16 statistics would round away: no further from float64 than torch is."""
    op, shape, width = NORMS[norm]
    torch.manual_seed(0)
    args = [(torch.randn(n) * 3 + offset).to(dtype) for n, offset in ((shape, 20), (width, 1), (width, 0))]
    found, torchs = run_op(op, *args)
    exact = op(*(a.double() for a in args)).numpy()
    assert np.abs(found - exact).max() <= 1.01 * np.abs(torchs - exact).max() + 1e-5


def test_type_as_really_casts():
    """The result goes through a convolution, which refuses a stale dtype."""
    weight = torch.randn(2, 2, 3, 3)
    found, expected = run_op(
        lambda x, w: nn.functional.conv2d(x.float().type_as(x), w), torch.randn(1, 2, 5, 5).bfloat16(), weight.bfloat16()
    )
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_attention_is_ours_and_never_nan():
    q = torch.randn(1, 2, 7, 8)
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    mask[..., 3:] = False
    found, expected = run_op(lambda q: nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.to(q.device)), q)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    nothing, _ = run_op(
        lambda q: nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=(q[:, :1, :1, :7] > 1e9)[..., :7]), q[..., :7]
    )
    assert np.array_equal(nothing, np.zeros_like(nothing))


class RowByRow(nn.Module):
    def forward(self, x, ends):
        return map_rows(lambda row, end: row * (torch.arange(row.shape[0], device=row.device) < end), x, ends)


def test_rows_run_in_a_loop_of_the_program():
    x, ends = torch.randn(5, 7), torch.arange(5)
    expected = torch.stack([row * (torch.arange(7) < end) for row, end in zip(x, ends, strict=True)])
    run = jax.jit(TracedModule(RowByRow()).function("forward"))
    np.testing.assert_array_equal(run({}, x.numpy(), ends.numpy().astype(np.int32)), expected.numpy())
    assert run.lower({}, x.numpy(), ends.numpy().astype(np.int32)).as_text().count("stablehlo.while") == 1


def test_what_torchax_names_and_torch_lacks_is_skipped():
    """In a process of its own: torchax is imported once. Each torch removes other operators; here, one that this torch has."""
    code = """
import torch
from torch._ops import OpOverloadPacket, _OpNamespace
find, overload = _OpNamespace.__getattr__, OpOverloadPacket.__getattr__
def without(name, lookup):
    def changed(owner, key):
        if key == name:
            raise AttributeError(f"this torch has no {key}")
        return lookup(owner, key)
    return changed
_OpNamespace.__getattr__ = without("_linalg_slogdet", find)
OpOverloadPacket.__getattr__ = without("dim_int", overload)
for name in ("_linalg_slogdet", "prod"):
    vars(torch.ops.aten).pop(name, None)
import jax.numpy as jnp
from tpuvid.compute.bridge import environment
from tpuvid.family import TracedModule, build
environment()
assert not hasattr(torch.ops.aten, "_linalg_slogdet"), "others still see that it lacks"
assert not hasattr(torch.ops.aten.prod, "dim_int")
from torchax.ops.ops_registry import all_aten_ops
print([op for op in all_aten_ops if "lacks" in repr(op)])
traced = TracedModule(build(lambda: torch.nn.Linear(2, 1)))
print(traced.function()({"weight": jnp.ones((1, 2)), "bias": jnp.ones(1)}, jnp.ones((1, 2))))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aten._linalg_slogdet" in done.stdout and done.stdout.endswith("[[3.]]\n")
