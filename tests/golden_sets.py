"""The golden sets that are here: checkpoints with the arrays that the original implementations made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from chatglm_ov import OVChatGLMForCausalLM, convert
from chatglm_ov.native import native, unavailable

TESTS = Path(__file__).parent
ROOTS = {"data": TESTS / "data" / "golden", "shared": TESTS.parent.parent / "shared" / "golden"}

without_library = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
OPS = [pytest.param("fused", marks=without_library), "stock"]
each_ops = pytest.mark.parametrize("ops", OPS)


def rounds_to_bf16(weight_format: str) -> bool:
    """Whether fused operations multiply many rows in bf16: those of int4 weights with tiles as well."""
    return weight_format == "bf16" or (weight_format == "int4" and native().isa().startswith("amx"))


@dataclass(frozen=True)
class Golden:
    """One folder: `checkpoint`, and `golden.npz` with arrays PROMPT_WHAT (see the README of the full set)."""

    root: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @cached_property
    def arrays(self) -> np.lib.npyio.NpzFile:
        return np.load(self.folder / "golden.npz")

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays.files

    def tensor(self, key: str) -> torch.Tensor | None:
        return torch.from_numpy(self[key]) if key in self else None

    def pads(self, prompt: str) -> np.ndarray:
        """Padding columns at the left of each row."""
        return self[f"{prompt}_pads"] if f"{prompt}_pads" in self else np.zeros(1, dtype=int)

    def __str__(self) -> str:
        return f"{self.root}-{self.folder.name}"


def here(file: str) -> list[Golden]:
    """The sets that have that file, each once: those in tests/data are parts of full ones."""
    found = {path.parent.name: Golden(name, path.parent) for name, root in ROOTS.items() for path in root.rglob(file)}
    return [found[name] for name in sorted(found)]


GOLDENS = [golden for golden in here("golden.npz") if not golden.folder.name.endswith("_chat")]


def cases(what: str) -> list:
    """Parameters (golden, prompt) for every array PROMPT_what that is here."""
    return [
        pytest.param(golden, key[: -len(what) - 1], id=f"{golden}-{key[: -len(what) - 1]}")
        for golden in GOLDENS
        for key in golden.arrays.files
        if key.endswith(f"_{what}")
    ]


def interrupt_calls(model: OVChatGLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when the plugin has done its work, and before we know of it."""
    execute = model.session.request._execute

    def interrupted() -> None:
        execute()
        raise KeyboardInterrupt

    monkeypatch.setattr(model.session.request, "_execute", interrupted)


def model_inputs(golden: Golden, prompt: str) -> dict[str, torch.Tensor | None]:
    """Ids and mask; positions only where the model would make other ones."""
    positions = golden.tensor(f"{prompt}_position_ids") if prompt == "both_tok" else None
    ids, mask = golden.tensor(f"{prompt}_input_ids"), golden.tensor(f"{prompt}_attention_mask")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.fixture(scope="session")
def open_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OVChatGLMForCausalLM]:
    """Function from a golden set (and a lowering) to its model in f32, each converted and loaded once."""

    @cache
    def open_once(checkpoint: Path, ops: str) -> OVChatGLMForCausalLM:
        folder = tmp_path_factory.mktemp("converted") / ops
        convert(checkpoint, folder, weight_formats=("f32",), ops=ops, progress=False)
        return OVChatGLMForCausalLM.from_pretrained(folder, inference_precision="f32")

    return lambda golden, ops="stock": open_once(golden.checkpoint, ops)


@pytest.fixture(params=OPS)
def open_either_model(request: pytest.FixtureRequest, open_model: Callable) -> Callable[[Golden], OVChatGLMForCausalLM]:
    """The same, of each lowering in turn."""
    return partial(open_model, ops=request.param)
