"""What an IR folder says without OpenVINO: the layers of an openvino_model.xml and the constants beside it.

OpenVINO does not read a graph with operations that it does not know, which fused ones are where the native library
cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.weights.ir import WEIGHTS_NAME

_DTYPES = {"u8": np.uint8, "i8": np.int8, "f32": np.float32, "bf16": ml_dtypes.bfloat16}
"""Element types of weights in the constants of fused graphs."""


@dataclass(frozen=True)
class Layer:
    """inputs: ids of the layers that it reads, in the order of its ports."""

    name: str
    kind: str
    attributes: Mapping[str, str]
    inputs: tuple[str, ...]


class GraphFile:
    """The layers of a graph by their ids. Raises ChatGLMError for an XML that is none, and for weights that cannot be
    read or are none."""

    def __init__(self, xml_path: Path):
        self.path = xml_path
        try:
            root = ElementTree.parse(xml_path).getroot()
            self.layers = _layers(root)
            self._weights = np.memmap(xml_path.with_name(WEIGHTS_NAME), np.uint8, mode="r")
        except (ElementTree.ParseError, KeyError, ValueError, OSError) as error:
            raise self.damaged(str(error)) from error

    def damaged(self, why: str) -> ChatGLMError:
        return ChatGLMError(self.path, "IR", f"damaged ({why})", "an IR as `convert` writes it")

    def constant(self, layer: Layer) -> np.ndarray:
        """A view on the file, in the element type and shape of a constant."""
        try:
            start, size = (int(layer.attributes[name]) for name in ("offset", "size"))
            shape = [int(length) for length in layer.attributes["shape"].split(",") if length.strip()]
            dtype = _DTYPES[layer.attributes["element_type"]]
            return self._weights[start : start + size].view(dtype).reshape(shape)
        except (KeyError, ValueError) as error:
            raise self.damaged(f"{layer.name}: {error}") from error


def _layers(root: ElementTree.Element) -> dict[str, Layer]:
    readers: dict[str, dict[int, str]] = {}
    for edge in root.iter("edge"):
        readers.setdefault(edge.attrib["to-layer"], {})[int(edge.attrib["to-port"])] = edge.attrib["from-layer"]
    layers = {}
    for layer in root.iter("layer"):
        number, data = layer.attrib["id"], layer.find("data")
        inputs = tuple(source for _, source in sorted(readers.get(number, {}).items()))
        attributes = {} if data is None else data.attrib
        layers[number] = Layer(layer.attrib["name"], layer.attrib["type"], attributes, inputs)
    return layers
