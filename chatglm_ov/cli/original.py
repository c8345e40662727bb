"""The original model through PyTorch: the only place where a checkpoint's own code may run, and only if told so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from chatglm_ov.cli.answer import Answer, ask
from chatglm_ov.config import read_config_json
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.timing import Stopwatch
from chatglm_ov.tokenizer import load_tokenizer


def open_original(checkpoint: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer of the folder, in float32: by its own code, or, where it brings none, by transformers' own
    classes and our tokenizer.

    Raises ChatGLMError without `trust_remote_code` for a folder with code, for one of which neither has the model, and
    where the code fails.
    """
    fields = read_config_json(checkpoint)
    transformers.logging.set_verbosity_error()
    if "auto_map" in fields:
        if not trust_remote_code:
            raise ChatGLMError(checkpoint, "--trust-remote-code", "missing", "given: the checkpoint's own code is run")
        with _its_own_errors(checkpoint):
            tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
            model = transformers.AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
            return model.float().eval(), tokenizer
    if fields.get("model_type") not in ("glm", "glm4"):
        raise ChatGLMError(checkpoint / "config.json", "auto_map", "missing", "the names of the checkpoint's classes")
    with _its_own_errors(checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    return model.float().eval(), load_tokenizer(checkpoint)


def ask_original(model: Any, tokenizer: Any, query: str, **options: Any) -> Answer:
    """Answer `query` by the model's own `chat()`; by its tokenizer's template where later revisions have none."""
    with _its_own_errors(model.name_or_path), torch.inference_mode():
        if hasattr(model, "chat"):
            return ask(model, tokenizer, query, **options)
        watch, messages = Stopwatch(), [{"role": "user", "content": query}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        criteria = transformers.StoppingCriteriaList([watch])
        ids = model.generate(**inputs, stopping_criteria=criteria, **options)[0, inputs["input_ids"].shape[1] :]
        return Answer(tokenizer.decode(ids, skip_special_tokens=True), watch.timing)


@contextmanager
def _its_own_errors(checkpoint: Path | str) -> Iterator[None]:
    """Whatever the checkpoint's code raises is told in one line: most of it does not run on releases of transformers
    that are much newer than itself."""
    try:
        yield
    except Exception as error:
        seen = f"a failure ({type(error).__name__}: {error})"
        wanted = f"code that runs with transformers {transformers.__version__}"
        raise ChatGLMError(checkpoint, "remote code", seen, wanted) from error
