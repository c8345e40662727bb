"""From a checkpoint folder to a converted folder that is complete by itself.

    OUT/config.json, generation_config.json, tokenizer files, prefix.safetensors of a trained prefix
    OUT/<weight_format>/openvino_model.xml, openvino_model.bin

Everything is written to a folder beside OUT that takes its name at the very end: a conversion that fails or is
killed leaves nothing that looks finished.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from chatglm_ov.checkpoint.files import refuse_placeholder
from chatglm_ov.checkpoint.lora import with_lora
from chatglm_ov.checkpoint.model_weights import model_weights
from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.checkpoint.trained_prefix import TrainedPrefix, has_prefix, read_prefix
from chatglm_ov.config import ArchitectureConfig, RopeRatioMeaning, parse_config
from chatglm_ov.conversion.checks import (
    check_addable,
    check_apart,
    check_arguments,
    check_replaceable,
    check_same_model,
)
from chatglm_ov.conversion.converted_config import converted_fields, given_fields, is_converted, warn_of_doubtful_base
from chatglm_ov.conversion.finished_folder import check_disk, finished_or_nothing, remove_leftovers
from chatglm_ov.conversion.graph import write_graph
from chatglm_ov.conversion.plan import Plan, make_plan
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.json_files import read_json_object
from chatglm_ov.native import check_forced_level, unavailable
from chatglm_ov.system.memory import available
from chatglm_ov.system.sizes import size
from chatglm_ov.tokenizer import save_tokenizer_files
from chatglm_ov.weights.choices import DEFAULT_CHOICES, FormatChoices
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.ir import WEIGHTS_NAME
from chatglm_ov.weights.quantized import QuantizedTensor
from chatglm_ov.weights.store import Progress, WeightStore

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
    source, target, adapter = Path(checkpoint), Path(output), None if lora is None else Path(lora)
    if ".." in target.parts:
        target = target.resolve()  # of a folder that is made on the way, `..` cannot be asked for yet
    fields = given_fields(source, rope_ratio_meaning, rope_theta, rope_scaling)
    config = parse_config(fields, source / "config.json")
    warn_of_doubtful_base(config)
    check_arguments(source, target, weight_formats, ops)
    text = None if calibration is None else calibration.source.path
    for name, path in (("LoRA", adapter), ("P-Tuning", p_tuning), ("calibration text", text)):
        if path is not None:
            check_apart(target, Path(path), name)
    if add:
        check_addable(target, weight_formats, overwrite)
    else:
        check_replaceable(target, overwrite)
    ops = available_ops(ops)
    with open_checkpoint(source, fields) as stored, with_lora(stored, adapter, config) as merged:
        weights = model_weights(config, merged)
        prefix = _trained_prefix(config, stored, None if p_tuning is None else Path(p_tuning))
        fields["pre_seq_len"] = None if prefix is None else prefix.length
        lora_name = None if adapter is None else adapter.resolve().name
        added = (converted_fields(fields, config, ops), prefix, lora_name, weight_formats)
        if add:
            check_same_model(target, *added)
        _check_calibration(weights, weight_formats, calibration)
        more_bytes = 0 if prefix is None else prefix.nbytes
        sequences = _sequences(source, config, calibration)
        tokens = sum(map(len, sequences))
        plan = make_plan(config, weights, weight_formats, ops, choices, calibration, more_bytes, tokens)
        log.info("%s", plan)
        remove_leftovers(target)
        check_disk(target, plan.disk_bytes + _OTHER_BYTES, ", ".join(plan.weight_formats))
        if plan.memory_bytes > (free := available()):
            log.warning("%s of memory are free: the system may end the conversion", size(free))
        replaced = is_converted(target) and not add
        with finished_or_nothing(target.resolve(), overwrite or add, replaced) as partial:
            if not add:
                _write_side_files(source, partial, fields, config, ops)
                if prefix is not None:
                    prefix.save(partial)
            described = {} if lora_name is None else {"lora": lora_name}
            with (
                _calibrated(
                    config, weights, plan, choices, calibration, sequences, partial, progress, prefix is not None
                ) as calibrated,
                _progress_bar(plan, progress) as report,
            ):
                for name in plan.weight_formats:
                    used, told = calibrated.get(name, weights), described
                    if calibration is not None and name in calibrated:
                        told = {**described, "calibration": calibration.chosen_by(name)}
                    _write_model(config, used, partial / name, name, ops, report, choices, told)
            if add:
                # Once more: a conversion takes long, and others may have been there.
                check_addable(target, weight_formats, overwrite)
                check_same_model(target, *added)
    return target


def _trained_prefix(config: ArchitectureConfig, weights: Checkpoint, folder: Path | None) -> TrainedPrefix | None:
    """The prefix in `folder`, or, without a folder, that of the checkpoint itself; None if it has none."""
    if folder is not None:
        with Checkpoint.open(folder) as tuned:
            if not has_prefix(tuned):
                raise ChatGLMError(folder, "prefix_encoder", "missing", "the tensors of a P-Tuning v2")
            return read_prefix(tuned, config)
    if has_prefix(weights):
        return read_prefix(weights, config)
    if config.pre_seq_len:
        wanted = "0, or the folder with the trained prefix encoder: --p-tuning"
        raise ChatGLMError(weights.folder / "config.json", "pre_seq_len", config.pre_seq_len, wanted)
    return None


def _check_calibration(weights: Checkpoint, weight_formats: Sequence[str], calibration: Calibration | None) -> None:
    if calibration is None:
        return
    if not set(calibration.weight_formats) & set(weight_formats):
        wanted = f"{' or '.join(calibration.weight_formats)} among the weight formats"
        raise ChatGLMError("convert", "calibration", calibration.label, wanted)
    if any(isinstance(weights[name], QuantizedTensor) for name in weights.names):
        raise ChatGLMError(weights.folder, "weights", "quantized already", "no calibration, or the original weights")


def _sequences(source: Path, config: ArchitectureConfig, calibration: Calibration | None) -> list[np.ndarray]:
    if calibration is None:
        return []
    from chatglm_ov.tokenizer import load_tokenizer

    return calibration.sequences(load_tokenizer(source), config)


@contextmanager
def _calibrated(
    config: ArchitectureConfig,
    weights: Checkpoint,
    plan: Plan,
    choices: FormatChoices,
    calibration: Calibration | None,
    sequences: list[np.ndarray],
    folder: Path,
    progress: bool,
    prefix: bool,
) -> Iterator[dict[str, Checkpoint]]:
    """By weight format, the weights with those that are chosen by the calibration and kept in `folder` for so long."""
    if calibration is None:
        yield {}
        return
    from chatglm_ov.calibration.needs import calibrated_weights
    from chatglm_ov.calibration.run import calibrate

    formats = calibrated_weights(config, choices, plan.weight_formats, calibration.methods)
    total = sum(map(len, formats.values()))
    with TemporaryDirectory(dir=folder) as kept:
        with tqdm(total=total, unit="weight", disable=not progress, desc=calibration.label) as bar:

            def report(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            chosen = calibrate(config, weights, formats, sequences, calibration.methods, Path(kept), report, prefix)
        yield chosen


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


def _write_model(
    config: ArchitectureConfig,
    weights: Checkpoint,
    folder: Path,
    weight_format: str,
    ops: str,
    report: Progress,
    choices: FormatChoices = DEFAULT_CHOICES,
    described: Mapping[str, str | int] = MappingProxyType({}),
) -> None:
    """described: what the IR tells about itself beside what it always does."""
    folder.mkdir()
    with WeightsFile(folder / WEIGHTS_NAME) as file:
        write_graph(config, WeightStore(weights, file, weight_format, report, choices), ops, described)


def convert_weights(
    weights: Checkpoint,
    fields: dict[str, Any],
    folder: Path,
    weight_format: str,
    ops: str,
    report: Progress,
    choices: FormatChoices = DEFAULT_CHOICES,
) -> None:
    """A converted folder of one weight format and nothing else, for measurements: config.json with `fields` and the
    model. ops: fused or stock, as `available_ops` gives it."""
    config = parse_config(fields)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", converted_fields(fields, config, ops))
    _write_model(config, weights, folder / weight_format, weight_format, ops, report, choices)


def _write_side_files(source: Path, folder: Path, fields: dict[str, Any], config: ArchitectureConfig, ops: str) -> None:
    """config.json, generation_config.json, tokenizer files."""
    _write_json(folder / "config.json", converted_fields(fields, config, ops))
    generation = source / "generation_config.json"
    if generation.exists():
        refuse_placeholder(generation)
        read_json_object(generation)
        # transformers does not take a mark of encoding.
        (folder / generation.name).write_bytes(generation.read_bytes().removeprefix(codecs.BOM_UTF8))
    else:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / generation.name, {name: value for name, value in ids.items() if value is not None})
    save_tokenizer_files(source, folder)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
