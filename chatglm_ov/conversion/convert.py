"""From a checkpoint folder to a converted folder that is complete by itself.

    OUT/config.json, generation_config.json, tokenizer files, prefix.safetensors of a trained prefix
    OUT/<weight_format>/openvino_model.xml, openvino_model.bin

Everything is written to a folder beside OUT that takes its name at the very end: a conversion that fails or is
killed leaves nothing that looks finished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from chatglm_ov.checkpoint.quantized import QuantizedTensor
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import RopeRatioMeaning, parse_config
from chatglm_ov.conversion.checks import (
    check_addable,
    check_apart,
    check_arguments,
    check_replaceable,
    check_same_model,
)
from chatglm_ov.conversion.converted_config import given_fields, is_converted, warn_of_doubtful_base
from chatglm_ov.conversion.finished_folder import check_disk, finished_or_nothing, remove_leftovers
from chatglm_ov.conversion.plan import Plan, make_plan
from chatglm_ov.conversion.source_model import SourceModel, opened_model
from chatglm_ov.conversion.write import write_model, write_side_files
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.native import check_forced_level, unavailable
from chatglm_ov.system.memory import available
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices
from chatglm_ov.weights.store import Progress

if TYPE_CHECKING:
    from chatglm_ov.calibration.text import Calibration

_OTHER_BYTES = 8 << 20
"""Room for graphs, configuration and tokenizer."""

log = logging.getLogger(__name__)


def convert(
    checkpoint: str | Path,
    output: str | Path,
    weight_formats: Sequence[str] = ("bf16", "int8"),
    ops: str = "fused",
    *,
    lora: str | Path | None = None,
    p_tuning: str | Path | None = None,
    choices: FormatChoices = DEFAULT_CHOICES,
    calibration: Calibration | None = None,
    rope_ratio_meaning: RopeRatioMeaning | None = None,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    add: bool = False,
    progress: bool = True,
) -> Path:
    """Convert `checkpoint`, a folder as the model's authors publish it, to the folder `output`.

    weight_formats: any of f32, bf16, int8 (a scale per output channel), int4 (a scale and a zero point per 128
    columns, embedding and LM head int8, unless chosen otherwise); what a checkpoint has quantized keeps its own groups
    and values. lora: a folder as PEFT saves a LoRA, to be merged into the weights (see `with_lora`). p_tuning: a folder
    with the prefix encoder of a P-Tuning v2, where the checkpoint does not hold it itself (see `read_prefix`).
    choices: other formats for some weights, other groups for int4.
    calibration: how int4 weights, and with GPTQ int8 ones, are chosen; None: each is rounded to the nearest. ops:
    `stock` builds the graph from OpenVINO's own operations; `fused` from those of the native library, and is `stock`,
    with a warning, where that cannot be used.
    rope_ratio_meaning: `position` or `base`, where the checkpoint's config.json does not tell (see
    `ChatGLM2Config`). rope_theta: the rotary base of `glm` and `glm4` models where config.json has a wrong one.
    rope_scaling: for contexts that are longer than those the model was trained on, fields as in config.json:
    {"rope_type": "yarn", "factor": 4.0} (also "linear", "ntk"), not for ChatGLM-6B. overwrite: a converted folder that
    is `output` is replaced, and what is in a folder of other things stays, beside the new files. add: `output` is a
    converted folder of the same model, which keeps its formats; with `overwrite` these ones are written anew. Returns
    `output`.

    Raises ChatGLMError for anything that is wrong with the arguments, the checkpoint or the disk; then nothing is
    left behind.
    """
    source, target = Path(checkpoint), Path(output)
    adapter, encoder = (None if path is None else Path(path) for path in (lora, p_tuning))
    if ".." in target.parts:
        target = target.resolve()  # of a folder that is made on the way, `..` cannot be asked for yet
    fields = given_fields(source, rope_ratio_meaning, rope_theta, rope_scaling)
    config = parse_config(fields, source / "config.json")
    warn_of_doubtful_base(config)
    check_arguments(source, target, weight_formats, ops)
    text = None if calibration is None else calibration.source.path
    for name, path in (("LoRA", adapter), ("P-Tuning", encoder), ("calibration text", text)):
        if path is not None:
            check_apart(target, path, name)
    if add:
        check_addable(target, weight_formats, overwrite)
    else:
        check_replaceable(target, overwrite)
    ops = available_ops(ops)
    with opened_model(source, fields, config, adapter, encoder) as model:
        if add:
            check_same_model(target, model, ops, weight_formats)
        _check_calibration(model, weight_formats, calibration)
        sequences = _sequences(model, calibration)
        more, tokens = 0 if model.prefix is None else model.prefix.nbytes, sum(map(len, sequences))
        plan = make_plan(model.config, model.weights, weight_formats, ops, choices, calibration, more, tokens)
        log.info("%s", plan)
        _check_room(target, plan)
        replaced = is_converted(target) and not add
        with finished_or_nothing(target.resolve(), overwrite or add, replaced) as partial:
            if not add:
                write_side_files(model, partial, ops)
            with _calibrated(model, plan, choices, calibration, sequences, partial, progress) as calibrated:
                _write_models(model, calibrated, partial, plan, ops, choices, calibration, progress)
            if add:
                # Once more: a conversion takes long, and others may have been there.
                check_addable(target, weight_formats, overwrite)
                check_same_model(target, model, ops, weight_formats)
    return target


def _check_calibration(model: SourceModel, weight_formats: Sequence[str], calibration: Calibration | None) -> None:
    if calibration is None:
        return
    if not set(calibration.weight_formats) & set(weight_formats):
        wanted = f"{' or '.join(calibration.weight_formats)} among the weight formats"
        raise ChatGLMError("convert", "calibration", calibration.label, wanted)
    if any(isinstance(model.weights[name], QuantizedTensor) for name in model.weights.names):
        raise ChatGLMError(model.folder, "weights", "quantized already", "no calibration, or the original weights")


def _sequences(model: SourceModel, calibration: Calibration | None) -> list[np.ndarray]:
    """Token ids of the calibration's text, int64 [tokens] each."""
    if calibration is None:
        return []
    from chatglm_ov.tokenizer import load_tokenizer

    return calibration.sequences(load_tokenizer(model.folder), model.config)


def _check_room(target: Path, plan: Plan) -> None:
    """Raises ChatGLMError where the disk has no room for what is planned; a warning where the memory has none."""
    remove_leftovers(target)
    check_disk(target, plan.disk_bytes + _OTHER_BYTES, ", ".join(plan.weight_formats))
    if plan.memory_bytes > (free := available()):
        log.warning("%s of memory are free: the system may end the conversion", size(free))


@contextmanager
def _calibrated(
    model: SourceModel,
    plan: Plan,
    choices: FormatChoices,
    calibration: Calibration | None,
    sequences: list[np.ndarray],
    folder: Path,
    progress: bool,
) -> Iterator[dict[str, Checkpoint]]:
    """By weight format, the weights with those that are chosen by the calibration and kept in `folder` for so long."""
    if calibration is None:
        yield {}
        return
    from chatglm_ov.calibration.needs import calibrated_weights
    from chatglm_ov.calibration.run import calibrate

    formats = calibrated_weights(model.config, choices, plan.weight_formats, calibration.methods)
    total, has_prefix = sum(map(len, formats.values())), model.prefix is not None
    with TemporaryDirectory(dir=folder) as kept:
        with tqdm(total=total, unit="weight", disable=not progress, desc=calibration.label) as bar:

            def report(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            chosen = calibrate(
                model.config, model.weights, formats, sequences, calibration.methods, Path(kept), report, has_prefix
            )
        yield chosen


def _write_models(
    model: SourceModel,
    calibrated: Mapping[str, Checkpoint],
    folder: Path,
    plan: Plan,
    ops: str,
    choices: FormatChoices,
    calibration: Calibration | None,
    progress: bool,
) -> None:
    with _progress_bar(plan, progress) as report:
        for name in plan.weight_formats:
            described = {} if model.lora is None else {"lora": model.lora}
            if calibration is not None and name in calibrated:
                described["calibration"] = calibration.chosen_by(name)
            weights = calibrated.get(name, model.weights)
            write_model(model.config, weights, folder / name, name, ops, report, choices, described)


def available_ops(ops: str) -> str:
    """The lowering that is used when `ops` is asked for; a warning says why it is another one."""
    if ops == "fused":
        check_forced_level()
    reason = unavailable() if ops == "fused" else None
    if reason is None:
        return ops
    log.warning("no fused operations (%s): the stock lowering is used", " ".join(reason.split()))
    return "stock"


@contextmanager
def _progress_bar(plan: Plan, shown: bool) -> Iterator[Progress]:
    with tqdm(total=plan.read_bytes, unit="B", unit_scale=True, disable=not shown, desc="convert") as bar:

        def report(name: str, nbytes: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(nbytes)

        yield report
