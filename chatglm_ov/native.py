"""The native library: kernels, packing and the OpenVINO operations made of them.

It is built where there is a C++ compiler on Linux x86-64, against the OpenVINO that is installed then. Where it is
missing or does not load, everything runs on OpenVINO's own operations.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cache
from types import ModuleType

import openvino  # noqa: F401  (brings libopenvino and libtbb, which the library links to)

from chatglm_ov.errors import ChatGLMError

NAME = "chatglm_ov._native"


@cache
def _imported() -> ModuleType | str:
    """The library, or why there is none."""
    try:
        path = os.environ.get("CHATGLM_OV_NATIVE")
        return importlib.import_module(NAME) if path is None else _from_file(path)
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)


@cache
def _load() -> ModuleType | str:
    """The library, or why it cannot be used."""
    module = _imported()
    try:
        if isinstance(module, ModuleType):
            # Raises where this process can use no instruction set level, or not the one that it is told to.
            module.isa()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return module


def _from_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path or 'an empty name'} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def check_forced_level() -> None:
    """Raises ChatGLMError where CHATGLM_OV_ISA asks for what is not on this machine: whoever sets it wants that level,
    and not to do without the library."""
    forced, module = os.environ.get("CHATGLM_OV_ISA"), _imported()
    if forced and isinstance(module, ModuleType) and unavailable() is not None:
        levels = ", ".join(module.present_isa_levels()) or "none"
        raise ChatGLMError("CHATGLM_OV_ISA", "level", forced, f"one of this machine: {levels}")


def unavailable() -> str | None:
    """Why the library cannot be used here; None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def native() -> ModuleType:
    """The library. Raises ChatGLMError where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise ChatGLMError("native library", "import", loaded, "a library built for the installed OpenVINO")
    return loaded


def library_path() -> str:
    """File of the library, as `Core.add_extension` takes it."""
    path = native().__file__
    assert path is not None
    return path
