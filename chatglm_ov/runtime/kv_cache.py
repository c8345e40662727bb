"""The KV cache of one request: the plugin's own in the stock lowering, blocks of slots in the fused one.

Letters: B rows, G key/value heads, T columns, D head_dim. A slot holds one real column: padding takes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
import openvino as ov

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.lowering.fused import BEAM_TABLE
from chatglm_ov.lowering.graph import CACHE
from chatglm_ov.system.memory import available
from chatglm_ov.system.sizes import size

BLOCK_SLOTS = 32
ELEMENT_TYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}

FIRST_SLOTS, LARGEST_STEP = 256, 2048
"""A cache begins with so many slots, doubles, and grows by this step from there on."""


class KVCache(Protocol):
    """What a request asks of its cache."""

    def takes(self, rows: int) -> bool:
        """Whether a sequence of so many rows can begin in it."""

    def of(self, request: ov.InferRequest) -> KVCache:
        """The cache, still empty, of another infer request of the same model."""

    def prepare(self, columns: np.ndarray, continued: np.ndarray) -> None:
        """Make room for `columns`, bool [B, T], false on padding; `continued` bool [B, past] is what it was when those
        in the cache were fed. Raises ChatGLMError where there is no memory for it, or the masks do not agree where
        they must; what is in the cache stays then."""

    def make_room(self, rows: int, slots: int, keep: bool) -> None:
        """Have at least so many rows and slots a row. keep: there are columns in the cache that are needed. Raises
        ChatGLMError where there is no memory for it; what is in the cache stays then."""

    def forget(self) -> None:
        """The next call begins a sequence."""

    def begin_with(self, keys: np.ndarray, values: np.ndarray, rows: int, slots: int) -> None:
        """The next call begins a sequence of so many rows, all behind these columns, float32 [layers, G, T, D] each;
        the longest row has so many real columns with them."""

    def truncate(self, columns: int) -> None:
        """The next call goes on behind so many columns."""

    def read(self, layer: int, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the columns of `attention_mask` [B, T], float32 [B, G, T, D] each."""


def _states(request: ov.InferRequest) -> dict[str, ov.VariableState]:
    return {state.name: state for state in request.query_state()}


class PluginCache:
    """The cache that a plugin keeps behind the stock lowering's states. Padding has a place in it like any column.

    quantized: it holds integers and scales. The CPU plugin mixes up scales in a sequence that begins with more rows
    than an earlier call in the same infer request had (seen with OpenVINO 2026.4).
    """

    def __init__(self, request: ov.InferRequest, quantized: bool):
        self._request, self._quantized = request, quantized
        self._fewest_rows: int | None = None  # of all calls

    def takes(self, rows: int) -> bool:
        return not self._quantized or self._fewest_rows is None or rows <= self._fewest_rows

    def of(self, request: ov.InferRequest) -> PluginCache:
        return PluginCache(request, self._quantized)

    def prepare(self, columns: np.ndarray, continued: np.ndarray) -> None:
        """The plugin's cache grows by itself."""
        self._fewest_rows = min(len(columns), self._fewest_rows or len(columns))

    def make_room(self, rows: int, slots: int, keep: bool) -> None:
        """Nothing to do: it grows by itself."""

    def forget(self) -> None:
        self._request.reset_state()

    def begin_with(self, keys: np.ndarray, values: np.ndarray, rows: int, slots: int) -> None:
        states = _states(self._request)
        for layer, parts in enumerate(zip(keys, values, strict=True)):
            for name, part in zip(("key", "value"), parts, strict=True):
                states[f"{CACHE}{layer}.{name}"].state = ov.Tensor(np.ascontiguousarray(part[None]))

    def truncate(self, columns: int) -> None:
        """The plugin's states only grow by themselves: what is left of each is copied."""
        for state in self._request.query_state():
            state.state = ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :columns]))

    def read(self, layer: int, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states = _states(self._request)
        key, value = (states[f"{CACHE}{layer}.{part}"].state.data.copy() for part in ("key", "value"))
        return key, value


@dataclass(frozen=True)
class BlockLayout:
    """Blocks of 32 slots of one key/value head, as csrc/kernels/cache_layout.h lays them out."""

    element_type: str
    num_key_value_heads: int
    head_dim: int

    @property
    def _padded_dim(self) -> int:
        return -(-self.head_dim // 16) * 16

    @property
    def _part_bytes(self) -> int:
        return BLOCK_SLOTS * self._padded_dim * ELEMENT_TYPES[self.element_type].itemsize

    @property
    def block_bytes(self) -> int:
        scales = 2 * BLOCK_SLOTS * 4 if self.element_type == "int8" else 0
        return 2 * self._part_bytes + scales

    def nbytes(self, rows: int, blocks: int) -> int:
        """Bytes of one layer's cache."""
        return rows * blocks * self.num_key_value_heads * self.block_bytes

    def encode(self, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Blocks u8 [n, G, block_bytes] of keys and values float32 [G, T, D]; slots behind T are zeros."""
        groups, tokens, dim = key.shape
        count = -(-tokens // BLOCK_SLOTS)
        padding = ((0, 0), (0, count * BLOCK_SLOTS - tokens), (0, self._padded_dim - dim))
        parts, scales = [], []
        for array in (key, value):
            if self.element_type == "int8":
                scale = np.abs(array).max(axis=-1, keepdims=True) / np.float32(127)
                array = np.rint(array / np.where(scale == 0, 1, scale))
                padded = np.pad(scale[..., 0], padding[:2]).astype(np.float32)
                scales.append(padded.reshape(groups, count, BLOCK_SLOTS).transpose(1, 0, 2))
            padded = np.pad(array, padding).astype(ELEMENT_TYPES[self.element_type])
            parts.append(padded.reshape(groups, count, BLOCK_SLOTS, -1).transpose(1, 0, 2, 3))
        keys = parts[0].reshape(count, groups, 2, 16, -1, 2).transpose(0, 1, 2, 4, 3, 5)
        values = parts[1].reshape(count, groups, 16, 2, -1, 16).transpose(0, 1, 4, 2, 5, 3)
        pieces = [np.ascontiguousarray(part).reshape(count, groups, -1) for part in (keys, values, *scales)]
        return np.concatenate([piece.view(np.uint8) for piece in pieces], axis=-1)

    def decode(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values float32 [G, 32 n, D] of consecutive blocks u8 [n, G, block_bytes]."""
        count, groups = blocks.shape[:2]
        part = self._part_bytes
        key, value = (
            np.ascontiguousarray(blocks[..., start : start + part]).view(ELEMENT_TYPES[self.element_type])
            for start in (0, part)
        )
        # [halves, pairs of dims, slots of a half, dims of a pair] and [lines of dims, pairs of slots, dims, slots].
        key = key.reshape(count, groups, 2, -1, 16, 2).transpose(0, 1, 2, 4, 3, 5)
        value = value.reshape(count, groups, -1, 16, 16, 2).transpose(0, 1, 3, 5, 2, 4)
        decoded = [array.reshape(count, groups, BLOCK_SLOTS, -1).astype(np.float32) for array in (key, value)]
        if self.element_type == "int8":
            scales = np.ascontiguousarray(blocks[..., 2 * part :]).view(np.float32)
            # Slots that were never written hold anything.
            with np.errstate(over="ignore", invalid="ignore"):
                decoded = [
                    array * scale[..., None] for array, scale in zip(decoded, np.split(scales, 2, axis=-1), strict=True)
                ]
        key, value = (
            array[..., : self.head_dim].transpose(1, 0, 2, 3).reshape(groups, -1, self.head_dim) for array in decoded
        )
        return key, value


def capacity(slots: int) -> int:
    """Slots that a cache gets which needs this many."""
    room = FIRST_SLOTS
    while room < slots:
        room += min(room, LARGEST_STEP)
    return room


class BlockCache:
    """The fused lowering's cache: one variable a layer, u8 [rows, blocks, G, block_bytes], and a beam table.

    The variables begin empty and get their memory before the first inference. It stays: a new sequence, fewer columns
    and a reorder of rows overwrite slots. Before an inference that needs more rows or slots each layer in turn gets
    larger memory, with what is in it if that is needed.
    """

    def __init__(self, request: ov.InferRequest, num_layers: int, layout: BlockLayout):
        states = _states(request)
        self._table = states[BEAM_TABLE]
        self._layers = [states[f"{CACHE}{layer}"] for layer in range(num_layers)]
        self.layout = layout
        self.rows = self.blocks = 0

    def takes(self, rows: int) -> bool:
        return True

    def of(self, request: ov.InferRequest) -> BlockCache:
        return BlockCache(request, len(self._layers), self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return len(self._layers) * self.layout.nbytes(self.rows, self.blocks)

    def prepare(self, columns: np.ndarray, continued: np.ndarray) -> None:
        past = continued.shape[1]
        if not np.array_equal(columns[:, :past], continued):
            row, column = np.argwhere(columns[:, :past] != continued)[0]
            wanted = f"{int(continued[row, column])}, as when the column was fed: padding has no slot in the cache"
            raise ChatGLMError("infer", f"attention_mask[{row}, {column}]", int(columns[row, column]), wanted)
        slots = int(np.count_nonzero(columns, axis=1).max())
        self.make_room(len(columns), slots, keep=past > 0)

    def make_room(self, rows: int, slots: int, keep: bool) -> None:
        if not keep and not self._layers[0].state.size:
            # Nothing yet, or nothing any more after OpenVINO's own reset_state.
            self.rows = self.blocks = 0
        if rows <= self.rows and slots <= self.blocks * BLOCK_SLOTS:
            return
        blocks = capacity(slots) // BLOCK_SLOTS
        if keep:
            rows, blocks = max(rows, self.rows), max(blocks, self.blocks)
        self.allocate(rows, blocks, keep)

    def allocate(self, rows: int, blocks: int, keep: bool) -> None:
        """Give every layer memory of this size; `keep`: with the blocks that there are, and no fewer of them."""
        self._check_memory(rows, blocks)
        if not keep:
            # Until all layers have it, whatever ends this early.
            self.rows = self.blocks = 0
        shape = (rows, blocks, self.layout.num_key_value_heads, self.layout.block_bytes)
        try:
            for layer in self._layers:
                new = np.empty(shape, np.uint8)
                if keep:
                    new[: self.rows, : self.blocks] = layer.state.data[: self.rows, : self.blocks]
                # The plugin copies it.
                layer.state = ov.Tensor(new, shared_memory=True)
        except (MemoryError, RuntimeError) as error:
            wanted = f"{size(self.layout.nbytes(rows, blocks))} a layer"
            raise ChatGLMError("KV cache", "memory", "used up", wanted) from error
        self.rows, self.blocks = rows, blocks

    def _check_memory(self, rows: int, blocks: int) -> None:
        wanted = len(self._layers) * self.layout.nbytes(rows, blocks)
        # A layer is there twice while it gets its memory.
        needed = wanted - self.nbytes + self.layout.nbytes(rows, blocks)
        free = available()
        if needed > free:
            shape = f"{rows} rows of {blocks * BLOCK_SLOTS} slots in {self.layout.element_type}"
            raise ChatGLMError("KV cache", "free memory", size(free), f"{size(needed)} more, for {shape}")

    def forget(self) -> None:
        """Nothing to do: a call whose columns are all new reads nothing of what is there."""

    def begin_with(self, keys: np.ndarray, values: np.ndarray, rows: int, slots: int) -> None:
        """They are kept once, in the first row, and the table sends all rows there. A sequence writes behind them."""
        tokens = keys.shape[2]
        self.make_room(rows, slots, keep=False)
        for layer, key, value in zip(self._layers, keys, values, strict=True):
            blocks = self.layout.encode(key, value)
            layer.state.data[0, : len(blocks)] = blocks
        self._table.state = ov.Tensor(np.zeros((1, -(-tokens // BLOCK_SLOTS)), np.int32))

    def truncate(self, columns: int) -> None:
        """Nothing to do: slots behind the last column are overwritten."""

    def read(self, layer: int, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Zeros for padding, which takes no slot."""
        table, cache = self._table.state.data, self._layers[layer].state.data
        heads, dim = self.layout.num_key_value_heads, self.layout.head_dim
        batch, columns = attention_mask.shape
        key = np.zeros((batch, heads, columns, dim), np.float32)
        value = np.zeros_like(key)
        for row in range(batch):
            real = np.flatnonzero(attention_mask[row])
            blocks = np.arange(-(-real.size // BLOCK_SLOTS))
            decoded = self.layout.decode(cache[table[row, blocks], blocks])
            for whole, part in zip((key, value), decoded, strict=True):
                whole[row][:, real] = part[:, : real.size]
        return key, value
