"""From a graph over a `WeightsFile` to an IR folder: openvino_model.xml beside the openvino_model.bin.

OpenVINO writes the XML; what this adds is where each constant lies in our own .bin, and the mark of a
decompression on the Convert of a bf16 weight, without which a plugin folds it to f32 at load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import openvino as ov

from chatglm_ov.weights.file import WeightsFile

IR_NAME = "openvino_model.xml"
WEIGHTS_NAME = "openvino_model.bin"
FORMAT_VERSION = 1
"""Version of the layout of a converted folder and of the constants in it; checked at load."""

RT_INFO = "chatglm_ov"
"""Name of what an IR tells about itself: format_version, weight_format, ops, packing_version with
fused ones, and the methods of a calibration."""

UNPACKED = "unpacked"
"""What the temporary IR of fused operations that were made stock ones tells."""

DECOMPRESSION_SUFFIX = ".decompressed"
"""Friendly names with this ending mark the Convert of a weight that is stored in bf16."""


def write_ir(model: ov.Model, weights: WeightsFile, xml_path: Path) -> None:
    """Write the XML of `model`, whose large constants are already in `weights`; small ones are appended. Raises
    OSError where it cannot be written."""
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name not in weights.entries:
            weights.write(name, node.data)
    # OpenVINO reads all constants: of what is not in the file yet that would be holes, whose pages are small ones.
    weights.flush()
    with _nowhere(xml_path.with_suffix(".nowhere")) as unwanted:
        try:
            ov.serialize(model, str(xml_path), str(unwanted))
        except RuntimeError as error:
            # All that OpenVINO says of a full disk.
            raise OSError(f"{xml_path.name}: {error}") from error
    tree = ElementTree.parse(xml_path)
    for layer in tree.iter("layer"):
        if layer.get("type") == "Const":
            _place(layer, weights)
        elif layer.get("type") == "Convert" and str(layer.get("name")).endswith(DECOMPRESSION_SUFFIX):
            _mark_decompression(layer)
    tree.write(xml_path, encoding="utf-8", xml_declaration=True)


@contextmanager
def _nowhere(path: Path) -> Iterator[Path]:
    """Where OpenVINO writes the weights once more, which nobody wants. It removes the file of that name when it fails:
    here a link, and not the device that is behind it."""
    if os.name != "posix":
        yield Path(os.devnull)
        return
    path.symlink_to(os.devnull)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_description(xml_path: Path) -> dict[str, str]:
    """What an IR tells about itself; nothing if it is not one of ours. Raises ElementTree.ParseError if it is no
    XML."""
    found = ElementTree.parse(xml_path).getroot().find(f"rt_info/{RT_INFO}")
    return {} if found is None else {field.tag: field.get("value", "") for field in found}


def _place(layer: ElementTree.Element, weights: WeightsFile) -> None:
    entry, data = weights.entries[str(layer.get("name"))], layer.find("data")
    assert data is not None and int(data.get("size", -1)) == entry.nbytes, layer.attrib
    data.set("offset", str(entry.offset))


def _mark_decompression(layer: ElementTree.Element) -> None:
    info = layer.find("rt_info")
    if info is None:
        # The schema's order of children is data, rt_info, input, output.
        info = ElementTree.Element("rt_info")
        layer.insert([child.tag for child in layer].index("data") + 1, info)
    ElementTree.SubElement(info, "attribute", {"name": "decompression", "version": "0"})
