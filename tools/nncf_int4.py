#!/usr/bin/env python
"""int4 as NNCF makes it of the same f32 graph, for comparison: a folder that `chatglm-ov eval` reads.

    pip install nncf==3.4.0
    python tools/nncf_int4.py CONVERTED OUT [--method plain]

CONVERTED has f32 and stock operations. Asymmetric int4 in groups of 128, embedding and LM head int8, as in our int4;
the text is that of our own calibration. Methods: plain; awq; scale (AWQ and scale estimation); gptq.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from chatglm_ov.calibration.text import Calibration
from chatglm_ov.config import load_config
from chatglm_ov.models import architecture
from chatglm_ov.runtime.ir_reading import read_ir
from chatglm_ov.tokenizer import load_tokenizer
from chatglm_ov.weight_formats import GROUP_SIZE
from chatglm_ov.weights.ir import IR_NAME, RT_INFO

METHODS = {"plain": {}, "awq": {"awq": True}, "scale": {"awq": True, "scale_estimation": True}, "gptq": {"gptq": True}}


def inputs_of(folder: Path, names: set[str]) -> list[dict[str, np.ndarray]]:
    """Those of the model for each sequence of the calibration's text."""
    config = load_config(folder)
    module, items = architecture(config), []
    for ids in Calibration().sequences(load_tokenizer(folder), config):
        rows, mask = ids[None], np.ones((1, len(ids)), np.int64)
        item: dict[str, Any] = {
            "input_ids": rows,
            "attention_mask": mask,
            "position_ids": module.position_ids(config, rows, mask),
            "prefix_length": module.prefix_length(config, rows, mask),
            "beam_idx": np.zeros(1, np.int32),
        }
        items.append({name: value for name, value in item.items() if name in names})
    return items


def compress(folder: Path, out: Path, method: str) -> None:
    import nncf

    model = read_ir(folder / "f32" / IR_NAME)
    items = inputs_of(folder, {port.any_name for port in model.inputs}) if METHODS[method] else None
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        dataset=None if items is None else nncf.Dataset(items),
        **METHODS[method],
    )
    compressed.set_rt_info("int4", [RT_INFO, "weight_format"])
    shutil.copytree(folder, out, ignore=lambda place, names: [n for n in names if (Path(place) / n).is_dir()])
    (out / "int4").mkdir()
    ov.save_model(compressed, out / "int4" / IR_NAME, compress_to_fp16=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=METHODS, default="plain")
    arguments = parser.parse_args()
    compress(arguments.converted, arguments.out, arguments.method)


if __name__ == "__main__":
    main()
