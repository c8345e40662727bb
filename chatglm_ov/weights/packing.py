"""Weights in the layout of the native library: one payload of bytes a weight, as csrc/kernels/packing.h has it.

The library lays out the codes of a block of rows; scales and zero points stand behind the codes of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov

from chatglm_ov.native import native
from chatglm_ov.weight_formats import WeightFormat

PANEL = 16
"""Output features that are laid side by side."""

PADDING = -1
"""Stands for a row of zeros in an order of rows."""


@dataclass(frozen=True)
class PackedWeight:
    """The payload of a weight in the graph, u8 [bytes], and what tells how to read it."""

    payload: ov.Node
    format: str
    out_features: int
    in_features: int
    group_size: int


def gate_up_rows(features: int) -> np.ndarray:
    """Order of the rows of a merged weight [gate; up] of 2 * `features` rows: 16 of gate, then the 16 of up that they
    multiply. Features that fill up the last 16 are PADDING."""
    gate = np.full(-(-features // PANEL) * PANEL, PADDING)
    gate[:features] = np.arange(features)
    up = np.where(gate == PADDING, PADDING, gate + features)
    return np.stack([gate.reshape(-1, PANEL), up.reshape(-1, PANEL)], axis=1).ravel()


def filled(rows: np.ndarray) -> np.ndarray:
    """An order of rows with PADDING up to a multiple of 16."""
    return np.pad(rows, (0, -rows.size % PANEL), constant_values=PADDING)


def layout_of(fmt: WeightFormat, out_features: int, in_features: int) -> Any:
    """The library's PackedLayout of a weight."""
    return native().PackedLayout(fmt.name, out_features, in_features, fmt.group_size(in_features))


def packed_block(
    fmt: WeightFormat, layout: Any, start: int, elements: tuple[np.ndarray, ...], padding: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of the payload that rows start, start + 1, ... fill, each with its place in bytes.

    start: a multiple of 16. elements: of n rows, as the format's `encode` gives them; n a multiple of 16 but in the
    last block. padding: bool [n], rows that are none: their weights are zero, and so are their scales.
    """
    parts = dict(zip((part.name for part in fmt.parts(layout.in_features)), elements, strict=True))
    panel, panels = start // PANEL, -(-len(padding) // PANEL)
    codes = np.ascontiguousarray(parts["weight"]).reshape(len(padding), -1)
    packed = np.empty(panels * layout.panel_bytes, np.uint8)
    layout.pack(codes.view(np.uint16) if fmt.name == "bf16" else codes, packed)
    yield panel * layout.panel_bytes, packed
    if "scale" in parts:
        parts["scale"][padding] = 0
    if fmt.name == "int8":
        yield layout.scale_offset + start * 4, parts["scale"].astype(np.float32)
    elif fmt.name == "int4":
        for name, offset, dtype in (
            ("scale", layout.scale_offset, np.float16),
            ("zero_point", layout.zero_point_offset, np.uint8),
        ):
            values = _by_panel(parts[name], panels, layout).astype(dtype)
            yield offset + panel * values[0].nbytes, values


def _by_panel(values: np.ndarray, panels: int, layout: Any) -> np.ndarray:
    """[n, groups, 1] -> [panels, groups with those of the padding, 16]."""
    padded = np.zeros((panels * PANEL, layout.padded_in // layout.group_size), values.dtype)
    padded[: len(values), : values.shape[1]] = values[..., 0]
    return padded.reshape(panels, PANEL, -1).transpose(0, 2, 1)
