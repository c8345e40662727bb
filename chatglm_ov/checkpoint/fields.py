"""config.json of a checkpoint, with what only its weights tell."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ov.checkpoint.prequantized import open_checkpoint
from chatglm_ov.checkpoint.reader import Checkpoint
from chatglm_ov.config import config_class, read_config_json
from chatglm_ov.models import architecture

_ROWS = 4096

log = logging.getLogger(__name__)


def checkpoint_fields(folder: Path) -> dict[str, Any]:
    """The contents of config.json. `tie_word_embeddings` is false where a head is stored that is not the embedding: the
    original computes with what is stored. Raises ChatGLMError for a folder that is no checkpoint."""
    fields = read_config_json(folder)
    described = config_class(fields, folder / "config.json")
    if fields.get("tie_word_embeddings") is not True or not described.reads_stored_lm_head:
        return fields
    module = architecture(described)
    with open_checkpoint(folder, fields) as weights:
        if module.LM_HEAD not in weights or _equal(weights, module.EMBEDDING, module.LM_HEAD):
            return fields
    log.warning("%s differs from the embedding, though tie_word_embeddings is true: it is used", module.LM_HEAD)
    return {**fields, "tie_word_embeddings": False}


def _equal(weights: Checkpoint, one: str, other: str) -> bool:
    if one not in weights or weights.shape(one) != weights.shape(other):
        return False
    blocks = [slice(start, start + _ROWS) for start in range(0, weights.shape(one)[0], _ROWS)]
    return all(np.array_equal(weights[one].rows(rows), weights[other].rows(rows)) for rows in blocks)
