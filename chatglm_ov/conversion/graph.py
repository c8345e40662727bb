"""The graph of a model with its weights: an IR on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.lowering import Lowering
from chatglm_ov.models import architecture
from chatglm_ov.native import native
from chatglm_ov.weights.ir import FORMAT_VERSION, IR_NAME, RT_INFO, write_ir
from chatglm_ov.weights.store import WeightStore


def write_graph(
    config: ArchitectureConfig, store: WeightStore, ops: str, described: Mapping[str, str | int] = MappingProxyType({})
) -> None:
    """The openvino_model.xml of a model beside the file of `store`, and its weights in that file. ops: fused or stock.
    described: what the IR tells about itself beside what it always does."""
    model = architecture(config).build(config, _lowering(ops, store))
    info = {"format_version": FORMAT_VERSION, "weight_format": store.weight_format, "ops": ops, **described}
    if ops == "fused":
        info["packing_version"] = native().PACKING_VERSION
    for name, value in info.items():
        model.set_rt_info(value, [RT_INFO, name])
    write_ir(model, store.file, store.file.path.with_name(IR_NAME))


def _lowering(ops: str, store: WeightStore) -> Lowering:
    if ops == "fused":
        from chatglm_ov.lowering.fused import FusedLowering

        return FusedLowering(store)
    from chatglm_ov.lowering.stock import StockLowering

    return StockLowering(store)
