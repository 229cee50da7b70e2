"""`Backend` in torch, for CPU and CUDA tensors.

Formulas are chosen so that no element's value depends on where it stands in a vectorised loop: on the
CPU `exp`, `tanh`, `sqrt`, `+ − × ÷` and sums over one row have that property, `sigmoid` and `rsqrt` have not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from xllm.codes import GroupCodes
from xllm.engine.kernels.ops import F32, I64, Buffer, KVSpan, RopeTable
from xllm.engine.kernels.reference.attention import AttentionPlan, attend, make_plan
from xllm.engine.kernels.reference.exactness import CANDIDATES, exact_row_multiple
from xllm.engine.kernels.reference.packed import can_pack, pack, packed_linear
from xllm.types import PAGE_SIZE, KVGroup

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GELU_FACTOR = math.sqrt(2.0 / math.pi)


def _t(x: Buffer) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError("a handle of another backend")
    return x


def _b(x: Tensor) -> Buffer:
    return Buffer(x)


def kept_on_cpu(dtype: str) -> str:
    """What weights of `dtype` are kept as on this CPU.

    Half-precision products that it has no instructions for are tens of times slower than single ones, so such
    weights are widened; their values, and the rounding between ops, stay those of `dtype`.
    """
    return "float32" if dtype == "float16" or not can_pack(_DTYPES[dtype]) else dtype


class TorchOps:
    """Owns nothing but its settings; buffers belong to whoever asked for them."""

    def __init__(self, dtype: str, device: str = "cpu") -> None:
        """`dtype` is the compute and KV dtype: float32, float16, bfloat16."""
        self._dtype = _DTYPES[dtype]
        self._device = torch.device(device)
        on_cpu = self._device.type == "cpu"
        self._matmul_dtype = _DTYPES[kept_on_cpu(dtype)] if on_cpu else self._dtype
        self._packs = on_cpu and can_pack(self._matmul_dtype)
        self._row_multiple = CANDIDATES[-2]
        self._deterministic = False

    @property
    def row_multiple(self) -> int:
        return self._row_multiple

    @property
    def deterministic(self) -> bool:
        return self._deterministic

    def probe(self, weights: Sequence[Buffer]) -> None:
        # CUDA libraries choose algorithms freely and `index_add_` is unordered there: nothing to measure.
        if self._device.type != "cpu":
            return
        multiple = exact_row_multiple(self._product, [_t(w) for w in weights], self._matmul_dtype)
        self._deterministic = multiple is not None
        self._row_multiple = multiple or self._row_multiple

    def running(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    # Buffers.

    def matrix(self, values: F32) -> Buffer:
        return self.tied_matrix(self.table(values))

    def table(self, values: F32) -> Buffer:
        # A copy, since the caller's array may be a read-only view of a file.
        own = torch.from_numpy(np.array(values, dtype=np.float32))
        return _b(own.to(self._dtype).to(self._matmul_dtype).to(self._device))

    def tied_matrix(self, table: Buffer) -> Buffer:
        return _b(pack(_t(table)) if self._packs else _t(table))

    @property
    def keeps_codes(self) -> bool:
        return False

    def matrix_of_codes(self, codes: GroupCodes) -> Buffer:
        raise NotImplementedError("the reference computes on dequantised weights")

    def vector(self, values: F32) -> Buffer:
        return _b(torch.from_numpy(np.array(values, dtype=np.float32)).to(self._device))

    def indices(self, values: I64) -> Buffer:
        return _b(torch.from_numpy(values).to(self._device))

    def kv_pages(self, group: KVGroup, num_pages: int) -> Buffer:
        shape = (num_pages, 2, len(group.layers), group.num_kv_heads, PAGE_SIZE, group.head_dim)
        if self._device.type != "cpu":
            return _b(torch.zeros(shape, dtype=self._dtype, device=self._device))
        # numpy leaves zeroing to the kernel, page by page at first use: gigabytes cost nothing at start.
        raw = np.zeros(math.prod(shape) * self._dtype.itemsize, dtype=np.uint8)
        return _b(torch.from_numpy(raw).view(self._dtype).view(shape))

    def page_memory(self, pages: Buffer) -> npt.NDArray[np.uint8] | None:
        tensor = _t(pages)
        if tensor.device.type != "cpu":
            return None
        view: npt.NDArray[np.uint8] = tensor.view(len(tensor), -1).view(torch.uint8).numpy()
        return view

    def copy_page(self, pages: Buffer, src: int, dst: int) -> None:
        _t(pages)[dst].copy_(_t(pages)[src])

    def zero_pages(self, pages: Buffer, which: Sequence[int]) -> None:
        for page in which:
            _t(pages)[page].zero_()

    def attention_plan(
        self, group: KVGroup, num_heads: int, spans: Sequence[KVSpan], num_rows: int
    ) -> Buffer:
        return Buffer(make_plan(group, num_heads, spans, num_rows, self._row_multiple, self._device))

    def to_numpy(self, x: Buffer) -> F32:
        array: F32 = _t(x).float().cpu().numpy()
        return array

    # Operations of a model.

    def embedding(self, ids: Buffer, table: Buffer, scale: float | None = None) -> Buffer:
        rows = _t(table).index_select(0, _t(ids)).to(self._dtype)
        if scale is not None:
            rows = rows * torch.tensor(scale, dtype=self._dtype, device=self._device)
        return _b(rows.float())

    def linear(self, x: Buffer, weight: Buffer, bias: Buffer | None = None) -> Buffer:
        y = self._product(_t(x).to(self._matmul_dtype), _t(weight))
        if bias is not None:
            y = y.float() + _t(bias)
        return _b(y.to(self._dtype))

    def rms_norm(self, x: Buffer, weight: Buffer, eps: float, weight_offset: float = 0.0) -> Buffer:
        w = _t(weight) + weight_offset if weight_offset else _t(weight)
        rows = _t(x).float().reshape(-1, w.shape[0])
        mean = (rows * rows).mean(-1, keepdim=True)
        y = rows / (mean + eps).sqrt_() * w
        return _b(y.to(self._dtype).view(_t(x).shape))

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        return _b(_t(x) + _t(y).float())

    def silu_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(gate_up, lambda g: g / (g.neg().exp_() + 1.0))

    def gelu_tanh_mul(self, gate_up: Buffer) -> Buffer:
        return self._gated(
            gate_up, lambda g: 0.5 * g * (torch.tanh(_GELU_FACTOR * (g + 0.044715 * (g * g * g))) + 1.0)
        )

    def split_columns(self, x: Buffer, widths: Sequence[int]) -> tuple[Buffer, ...]:
        return tuple(_b(part) for part in torch.split(_t(x), list(widths), dim=1))

    def rope_rows(self, table: RopeTable, positions: Buffer) -> RopeTable:
        cos, sin = (_t(x).index_select(0, _t(positions)).unsqueeze(1) for x in (table.cos, table.sin))
        return RopeTable(cos=_b(cos), sin=_b(sin))

    def rope(self, x: Buffer, rows: RopeTable) -> Buffer:
        cos, sin = _t(rows.cos), _t(rows.sin)
        heads = _t(x).float().reshape(len(_t(x)), -1, 2 * cos.shape[2])
        a, b = heads.chunk(2, dim=2)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2)
        return _b(turned.view(len(heads), -1).to(self._dtype))

    def attention(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        pages: Buffer,
        layer: int,
        plan: Buffer,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Buffer:
        if not isinstance(plan, AttentionPlan):
            raise TypeError("a plan of another backend")
        out = attend(_t(q), _t(k), _t(v), _t(pages), layer, plan, scale, softcap)
        return _b(out.to(self._dtype))

    def select_rows(self, x: Buffer, rows: Buffer) -> Buffer:
        return _b(_t(x).index_select(0, _t(rows)))

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        return _b(torch.tanh(_t(x) / cap) * cap)

    def end_layer(self, layer: int) -> None:
        """Nobody can stop an eager step."""

    def all_reduce(self, x: Buffer) -> Buffer:
        return x

    def all_gather(self, x: Buffer) -> Buffer:
        return x

    def all_to_all(self, x: Buffer) -> Buffer:
        return x

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        return packed_linear(x, weight) if self._packs else torch_linear(x, weight)

    def _gated(self, gate_up: Buffer, activation: Callable[[Tensor], Tensor]) -> Buffer:
        # A contiguous gate keeps `exp` and `tanh` on one code path whatever the row count.
        gate, up = _t(gate_up).float().chunk(2, dim=1)
        return _b((activation(gate.contiguous()) * up).to(self._dtype))
