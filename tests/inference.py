"""A compiled model that tells of operations that fail, also with one thread, where OpenVINO's `infer` does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov


class Inference:
    """Calls with the inputs in the model's order; returns copies of the outputs in theirs. Keeps its state."""

    def __init__(self, compiled: ov.CompiledModel):
        self.request = compiled.create_infer_request()

    def __call__(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        self.request.start_async(list(inputs))
        self.request.wait()
        return [tensor.data.copy() for tensor in self.request.output_tensors]
