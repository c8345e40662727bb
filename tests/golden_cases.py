"""Golden prompts at the level of the runtime: what a Request takes, and teacher-forced runs.

Letters: B rows, L prompt columns, S decode steps that the set holds, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_sets import GOLDENS, OPS, ROOTS, Golden, each_ops, here, without_library  # noqa: F401
from safetensors.numpy import save_file

from chatglm_ov import convert
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import read_config_json
from chatglm_ov.runtime.loading import CompiledModel, Request, load_model

TOLERANCE = 1e-3
"""Of an f32 run against the originals: their own float64 and float32 runs differ by 1e-5."""

Opener = Callable[..., CompiledModel]


def small(name: str) -> Golden:
    """One of the sets that come with the project."""
    return Golden("data", next(path for path in ROOTS["data"].rglob(name) if path.is_dir()))


V1, V2 = small("v1_tiny"), small("v2_tiny")
each_small = pytest.mark.parametrize("golden", [V1, V2], ids=str)
each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=str)
CHATS = here("chat.json")


@dataclass(frozen=True)
class Prompt:
    """ids int64 [B, L]; keep int64 [B, L], 1 = real column; position_ids int64 [B, L] or [B, 2, L]; prefix int64 [B]
    or None."""

    ids: np.ndarray
    keep: np.ndarray
    position_ids: np.ndarray
    prefix: np.ndarray | None

    @property
    def rows(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> Prompt:
        """Row i without its padding."""
        real = self.keep[i].astype(bool)
        prefix = None if self.prefix is None else self.prefix[i : i + 1] - np.count_nonzero(~real)
        return Prompt(
            self.ids[i : i + 1, real], self.keep[i : i + 1, real], self.position_ids[i : i + 1, ..., real], prefix
        )

    def feed(self, request: Request, start: int = 0, end: int | None = None, logits_to_keep: int = 0) -> np.ndarray:
        """Run columns start..end, the earlier ones being in the cache."""
        columns = slice(start, end)
        return request.infer(
            self.ids[:, columns],
            self.keep[:, :end],
            self.position_ids[..., columns],
            np.arange(self.rows),
            logits_to_keep,
            self.prefix,
        )

    def extended(self, tokens: np.ndarray) -> Prompt:
        """With generated tokens [B, n] behind it."""
        n = tokens.shape[1]
        step = np.arange(1, n + 1)
        last = self.position_ids[..., -1:]
        following = last + (step if last.ndim == 2 else np.stack([0 * step, step]))
        return Prompt(
            np.concatenate([self.ids, tokens], axis=1),
            np.concatenate([self.keep, np.ones_like(tokens)], axis=1),
            np.concatenate([self.position_ids, following], axis=-1),
            self.prefix,
        )


def given_mask(golden: Golden, name: str) -> np.ndarray | None:
    """The attention mask of a golden prompt as int64 [B, L], 1 = real; None where no column is padding."""
    if f"{name}_attention_mask" not in golden:
        return None
    mask = golden[f"{name}_attention_mask"]
    if mask.ndim == 4:
        mask = 1 - mask[:, 0, -1].astype(np.int64)
    return None if mask.all() else mask


def golden_prompt(golden: Golden, name: str, model: CompiledModel) -> Prompt:
    """A golden prompt with the positions that the original was given."""
    ids, mask = golden[f"{name}_input_ids"], given_mask(golden, name)
    prefix = model.architecture.prefix_length(model.config, ids, mask)
    return Prompt(ids, np.ones_like(ids) if mask is None else mask, golden[f"{name}_position_ids"], prefix)


def own_prompt(ids: np.ndarray, model: CompiledModel, mask: np.ndarray | None = None) -> Prompt:
    """Any prompt, with the positions that the model's own rules give."""
    prefix = model.architecture.prefix_length(model.config, ids, mask)
    positions = model.architecture.position_ids(model.config, ids, mask)
    return Prompt(ids, np.ones_like(ids) if mask is None else mask, positions, prefix)


def teacher_forced(request: Request, prompt: Prompt, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, L, V] of the prompt, and [B, S, V] of its last column and of each token but the last."""
    request.reset()
    length, whole = prompt.ids.shape[1], prompt.extended(tokens[:, :-1])
    prefill = prompt.feed(request)
    steps = [whole.feed(request, at, at + 1) for at in range(length, whole.ids.shape[1])]
    return prefill, np.concatenate([prefill[:, -1:], *steps], axis=1)


def chat_prompts(golden: Golden) -> list[np.ndarray]:
    """Prompt ids int64 [1, L] of a chat set."""
    entries = json.loads((golden.folder / "chat.json").read_text(encoding="utf-8"))
    return [np.array([entry["prompt_ids"]], dtype=np.int64) for entry in entries]


def stored_weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, float32."""
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint[name].read() for name in checkpoint.names}


def write_checkpoint(folder: Path, like: Path, tensors: dict[str, np.ndarray], **fields: object) -> Path:
    """A checkpoint with the config.json of `like`, some fields replaced (None: left out), and these tensors."""
    config = {name: value for name, value in {**read_config_json(like), **fields}.items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


class AnyProperties(dict):
    """No properties, as a key of a cache."""

    def __hash__(self):
        return id(self)


@pytest.fixture(scope="session")
def open_compiled(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Function (checkpoint folder, weight_format, inference_precision, ops, further options of load_model) ->
    CompiledModel, each made once."""

    @cache
    def converted(checkpoint: Path, weight_format: str, ops: str) -> Path:
        folder = tmp_path_factory.mktemp("converted") / weight_format
        return convert(checkpoint, folder, (weight_format,), ops=ops, progress=False)

    @cache
    def open_once(
        checkpoint: Path,
        weight_format: str = "f32",
        precision: str | None = "f32",
        ops: str = "stock",
        **options: Any,
    ) -> CompiledModel:
        return load_model(converted(checkpoint, weight_format, ops), weight_format, precision, **options)

    return open_once


@pytest.fixture(params=OPS)
def open_either(request: pytest.FixtureRequest, open_compiled: Opener) -> Opener:
    """The same, of each lowering in turn."""
    return partial(open_compiled, ops=request.param)
