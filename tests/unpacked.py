"""What a folder of fused operations is unpacked to, and what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov

from chatglm_ov import convert
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.runtime.unpacked_ir import unpacked_ir
from chatglm_ov.weights.ir import IR_NAME

REASON = "it was left at home"


def weights_of(model: ov.Model) -> dict[str, tuple[str, list[int], bytes]]:
    """Element type, shape and bytes of the constants that have the name of a weight."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {
        node.get_friendly_name(): (
            node.get_element_type().get_type_name(),
            list(node.get_output_shape(0)),
            node.data.tobytes(),
        )
        for node in constants
        if not node.get_friendly_name().startswith("Constant_")
    }


def operations_of(model: ov.Model) -> list[str]:
    return sorted(node.get_type_name() for node in model.get_ops())


def check_same(checkpoint: Path, formats: tuple[str, ...], folder: Path, **options: Any) -> None:
    """Unpacked, a fused folder is what the stock lowering makes of the checkpoint. options: of `convert`."""
    for ops in ("fused", "stock"):
        convert(checkpoint, folder / ops, formats, ops, progress=False, **options)
    config = load_model(folder / "stock", formats[0]).config
    for name in formats:
        with unpacked_ir(folder / "fused" / name / IR_NAME, config, name, REASON) as xml:
            ours, wanted = read_ir(xml), read_ir(folder / "stock" / name / IR_NAME)
        found = weights_of(ours)
        assert len(found) > 4 * config.num_layers
        assert found == weights_of(wanted)
        assert operations_of(ours) == operations_of(wanted)
