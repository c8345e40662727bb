"""From an IR folder to the graph that can be compiled here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from xml.etree.ElementTree import ParseError

import openvino as ov

from chatglm_ov.checkpoint.files import refuse_placeholder
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError, last_line
from chatglm_ov.native import check_forced_level, library_path, native, unavailable
from chatglm_ov.runtime.unpacked_ir import unpacked_ir
from chatglm_ov.system.huge_pages import advise_huge_pages
from chatglm_ov.weights.ir import FORMAT_VERSION, WEIGHTS_NAME, read_description
from chatglm_ov.weights.unpacking import UNPACKED_VERSION


@cache
def core() -> ov.Core:
    """The package's own Core."""
    return ov.Core()


@cache
def _core_with_operations() -> ov.Core:
    """The same, which reads IRs with the native library's operations from then on."""
    core().add_extension(library_path())
    return core()


def runnable_ir(path: Path, config: ArchitectureConfig, weight_format: str) -> ov.Model:
    """The graph in `path` as `read_ir` gives it, but fused operations that cannot run here, for want of the native
    library, are made stock ones; a warning says so."""
    described = described_ir(path)
    reason = _why_unpacked(path, described)
    if reason is None:
        return _advised(path, described)
    with unpacked_ir(path, config, weight_format, reason) as unpacked:
        return _advised(unpacked, described_ir(unpacked))


def why_unpacked(path: Path) -> str | None:
    """Why the fused operations in `path` cannot run here, so that they are unpacked at load; None where they are not.
    Raises ChatGLMError where they cannot be unpacked either."""
    return _why_unpacked(path, described_ir(path))


def _why_unpacked(path: Path, described: dict[str, str]) -> str | None:
    reason = unavailable()
    if reason is None or described.get("ops") != "fused":
        return None
    check_forced_level()
    _check_version(path, "packing_version", described, UNPACKED_VERSION)
    return reason


def _advised(path: Path, described: dict[str, str]) -> ov.Model:
    model = _read(path, described)
    advise_huge_pages(model, path.with_name(WEIGHTS_NAME).stat().st_size)
    return model


def read_ir(path: Path) -> ov.Model:
    """The graph in `path`, an openvino_model.xml, over its mapped weights. Raises ChatGLMError if it is damaged, of
    another version, or made of operations that cannot run here."""
    return _read(path, described_ir(path))


def _read(path: Path, described: dict[str, str]) -> ov.Model:
    reader = _core_for(path, described)
    try:
        model = reader.read_model(path)
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    # Its steps are not checked against their weights: those that it is made of are, as nodes of the graph.
    if any(node.get_type_name() == "Chain" for node in model.get_ops()):
        raise ChatGLMError(path, "IR", "with an operation Chain", "an IR as `convert` writes it")
    return model


def described_ir(path: Path) -> dict[str, str]:
    """What an IR tells about itself. Raises ChatGLMError where it is damaged, without its weights or of another
    version."""
    weights = path.with_name(WEIGHTS_NAME)
    if not weights.is_file():
        seen = "a folder" if weights.exists() else "missing"
        raise ChatGLMError(weights, "file", seen, "the weights beside the IR")
    refuse_placeholder(weights)
    try:
        described = read_description(path)
    except ParseError as error:
        raise _unreadable(path, error) from error
    _check_version(path, "format_version", described, FORMAT_VERSION)
    return described


def _core_for(path: Path, described: dict[str, str]) -> ov.Core:
    if described.get("ops") != "fused":
        return core()
    check_forced_level()
    if (reason := unavailable()) is not None:
        seen = f"fused, which cannot run here ({' '.join(reason.split())})"
        raise ChatGLMError(path, "ops", seen, "stock: convert again with --ops stock, or install the native library")
    _check_version(path, "packing_version", described, native().PACKING_VERSION)
    return _core_with_operations()


def _check_version(path: Path, name: str, described: dict[str, str], wanted: int) -> None:
    if described.get(name) != str(wanted):
        seen = described.get(name, "missing")
        raise ChatGLMError(path, name, seen, f"{wanted}: convert the checkpoint again with this version")


def _unreadable(path: Path, error: Exception) -> ChatGLMError:
    return ChatGLMError(path, "IR", f"unreadable ({last_line(error)})", "an IR as `convert` writes it")
