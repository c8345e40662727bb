"""`load_tokenizer`: the right tokenizer class for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ov.chat.templates import template_of
from chatglm_ov.errors import ChatGLMError, first_line
from chatglm_ov.tokenizer.files import (
    CONFIG_FILE,
    FAST,
    FAST_FILE,
    LEFT_OUT,
    MODEL_FILE,
    TEMPLATE_FILE,
    V1_FILE,
    check_there,
    detect_family,
    num_image_tokens,
    read_json,
    read_template,
    unreadable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str | Path, *, family: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or a converted folder. No code of the checkpoint is run.

    The class follows from the files: ice_text.model v1, tokenizer.model ChatGLM2, ChatGLM3 or GLM-4, tokenizer.json
    alone transformers' own fast tokenizer, with the chat template of GLM-4 or GLM-Edge where the folder brings none and
    the vocabulary is one of theirs. `family` ("chatglm", "chatglm2", "chatglm3", "glm4") overrides what the
    folder says; other keyword arguments go to the tokenizer, before what tokenizer_config.json has.
    """
    folder = _folder(folder)
    found = detect_family(folder, family)
    config = read_json(folder / CONFIG_FILE)
    if found == FAST:
        return _load_fast(folder, config, kwargs)
    for name in LEFT_OUT:
        config.pop(name, None)
    config["name_or_path"] = str(folder)
    if (folder / TEMPLATE_FILE).is_file():
        config["chat_template"] = read_template(folder / TEMPLATE_FILE)
    file = folder / (V1_FILE if found == "chatglm" else MODEL_FILE)
    check_there(file, found)
    if found == "chatglm":
        config["num_image_tokens"] = num_image_tokens(folder)
    try:
        return _class(found)(vocab_file=str(file), **(config | kwargs))
    except ChatGLMError:
        raise
    except Exception as error:  # some releases assert
        if kwargs:
            raise
        seen = f"unusable ({first_line(error)})"
        raise ChatGLMError(folder / CONFIG_FILE, "fields", seen, "those of a Hugging Face tokenizer") from error


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, Path)):
        raise ChatGLMError("load_tokenizer", "folder", f"of type {type(folder).__name__}", "a path")
    path = Path(folder)
    if not path.is_dir():
        raise ChatGLMError(path, "folder", "a file" if path.exists() else "missing", "a folder with a tokenizer")
    return path


def _class(family: str) -> Any:
    from chatglm_ov.tokenizer.chatglm import ChatGLMTokenizer
    from chatglm_ov.tokenizer.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
    from chatglm_ov.tokenizer.glm4 import ChatGLM4Tokenizer

    classes = (ChatGLMTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLM4Tokenizer)
    return {each.family: each for each in classes}[family]


def _load_fast(folder: Path, config: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    # Older transformers take the blanks before punctuation out of byte-level text unless told not to.
    defaults: dict[str, Any] = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    if "model_input_names" not in config:
        # Older ones make three, of which these models take two.
        defaults["model_input_names"] = ["input_ids", "attention_mask"]
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, **defaults | kwargs)
    except Exception as error:  # the library raises its own kinds, some of them plain Exception
        raise unreadable(folder / FAST_FILE, error) from None
    tokenizer.chat_template = tokenizer.chat_template or template_of(tokenizer)
    return tokenizer
