"""Tokenizer files of a checkpoint folder: which family they belong to, and how they are copied.

Files are read as data only. `tokenization_chatglm.py`, where a checkpoint brings one, is looked at as text.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from chatglm_ov.checkpoint.files import refuse_placeholder
from chatglm_ov.errors import ChatGLMError, first_line
from chatglm_ov.json_files import read_json_object
from chatglm_ov.published_names import generation_of_name, is_chatglm2
from chatglm_ov.tokenizer.ranks import read_ranks
from chatglm_ov.tokenizer.sentencepiece_model import load_sentencepiece

FAMILIES = ("chatglm", "chatglm2", "chatglm3", "glm4")
MARKER = "chatglm_ov_tokenizer"
FAST = "fast"

V1_FILE = "ice_text.model"
MODEL_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
REMOTE_CODE = "tokenization_chatglm.py"
TEMPLATE_FILE = "chat_template.jinja"

# Files that PreTrainedTokenizerFast may want beside tokenizer.json.
_FAST_EXTRAS = ("special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
_CLASS_NAMES = {
    "chatglm": "ChatGLMTokenizer",
    "chatglm2": "ChatGLM2Tokenizer",
    "chatglm3": "ChatGLM3Tokenizer",
    "glm4": "ChatGLM4Tokenizer",
}
# Fields of tokenizer_config.json that have no say: where remote code and files are, and how the last user padded.
LEFT_OUT = ("auto_map", "vocab_file", "tokenizer_file", "padding_side")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n?\Z")


def read_template(path: Path) -> str:
    """A chat template. Raises ChatGLMError for what is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatGLMError(path, "contents", f"not UTF-8 ({error.reason} at byte {error.start})", "a text") from None


def check_there(path: Path, family: str) -> None:
    """Raises ChatGLMError for a vocabulary file that is missing."""
    if not path.is_file():
        raise ChatGLMError(path.parent, path.name, "missing", f"the vocabulary of family {family}")


def unreadable(path: Path, error: Exception) -> ChatGLMError:
    """The error that tells of a tokenizer.json that the library refused."""
    seen = f"one that cannot be read ({type(error).__name__}: {first_line(error)})"
    return ChatGLMError(path, "content", seen, "a tokenizer.json of the tokenizers library")


def check_vocabulary(path: Path, family: str) -> None:
    """Raises ChatGLMError for a vocabulary file that a tokenizer of that family cannot be made of."""
    check_there(path, family)
    refuse_placeholder(path)
    if family == FAST:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise unreadable(path, error) from None
    elif family == "glm4":
        read_ranks(path.read_bytes(), path)
    else:
        load_sentencepiece(path.read_bytes(), path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} where the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def is_tiktoken(path: Path) -> bool:
    """True for the text format `base64(bytes) rank` of GLM-4, False for a sentencepiece model (binary)."""
    with path.open("rb") as file:
        return _RANK_LINE.match(file.readline(4096)) is not None


def detect_family(folder: Path, family: str | None = None) -> str:
    """One of `FAMILIES`, or `FAST` for a folder with tokenizer.json alone.

    `family` overrides, then the marker that a converted folder carries, then the kind of the files. ChatGLM2 and
    ChatGLM3 share one vocabulary file; see `_chatglm2_or_3` for what tells them apart.
    """
    if family is not None and family not in FAMILIES:
        raise ChatGLMError(folder, "family", repr(family), " or ".join(FAMILIES))
    config = read_json(folder / CONFIG_FILE)
    marker = config.get(MARKER)
    if marker is not None and marker not in FAMILIES:
        raise ChatGLMError(folder / CONFIG_FILE, MARKER, repr(marker), " or ".join(FAMILIES))
    found = _family_of_files(folder, config)
    if found is None:
        files = f"{V1_FILE}, {MODEL_FILE} or {FAST_FILE}"
        raise ChatGLMError(folder, "tokenizer file", "missing", files)
    return family or marker or found


def _family_of_files(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / V1_FILE).is_file():
        return "chatglm"
    if (folder / MODEL_FILE).is_file():
        return "glm4" if is_tiktoken(folder / MODEL_FILE) else _chatglm2_or_3(folder, config)
    return FAST if (folder / FAST_FILE).is_file() else None


def _chatglm2_or_3(folder: Path, config: dict[str, Any]) -> str:
    """The first of these that says something: the published name, the chat template and added tokens, the checkpoint's
    tokenizer code as text, the name and the transformers version in config.json. ChatGLM3 where nothing does."""
    model = read_json(folder / "config.json")
    named = generation_of_name(config.get("name_or_path"))
    if named in (2, 3):
        return f"chatglm{named}"
    written = json.dumps([config.get("chat_template"), config.get("added_tokens_decoder")], ensure_ascii=False)
    if "<|user|>" in written or "<|assistant|>" in written:
        return "chatglm3"
    code = folder / REMOTE_CODE
    if code.is_file():
        return "chatglm3" if b"<|system|>" in code.read_bytes() else "chatglm2"
    return "chatglm2" if is_chatglm2(model) else "chatglm3"


def num_image_tokens(folder: Path) -> int:
    """Ids that stand before the text vocabulary of v1: 20000 in the early checkpoints, 0 in the later ones.

    From tokenizer_config.json; without the key there, from config.json's vocabulary size (150528 early, 130528 later);
    without both, 20000, the default of the published tokenizer class.
    """
    value = read_json(folder / CONFIG_FILE).get("num_image_tokens")
    if value is None:
        vocab_size = read_json(folder / "config.json").get("vocab_size", 150528)
        value = 0 if isinstance(vocab_size, int) and vocab_size < 150528 else 20000
    if not isinstance(value, int) or value < 0:
        raise ChatGLMError(folder / CONFIG_FILE, "num_image_tokens", repr(value), "a number, 0 or more")
    return value


def save_tokenizer_files(checkpoint: Path, output: Path, *, family: str | None = None) -> list[Path]:
    """Copies the tokenizer of `checkpoint` into the folder `output`, so that it loads from there alone.

    tokenizer_config.json loses its pointers to remote code, and the side on which a training padded, and gains the
    family's name. Returns the files written; [] where the checkpoint has no tokenizer. Raises ChatGLMError for files
    that no tokenizer can be made of.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    found = [checkpoint / name for name in (V1_FILE, MODEL_FILE, FAST_FILE) if (checkpoint / name).is_file()]
    if not found:
        return []
    refuse_placeholder(found[0])
    family = detect_family(checkpoint, family)
    config = read_json(checkpoint / CONFIG_FILE)
    for name in LEFT_OUT:
        config.pop(name, None)
    vocabulary = {FAST: FAST_FILE, "chatglm": V1_FILE}.get(family, MODEL_FILE)
    check_vocabulary(checkpoint / vocabulary, family)
    if (checkpoint / TEMPLATE_FILE).is_file():
        read_template(checkpoint / TEMPLATE_FILE)
    if family == FAST:
        names = [vocabulary, *_FAST_EXTRAS]
    else:
        names = [vocabulary, TEMPLATE_FILE]
        config |= {MARKER: family, "tokenizer_class": _CLASS_NAMES[family]}
    if family == "chatglm":
        config["num_image_tokens"] = num_image_tokens(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        if (checkpoint / name).is_file():
            refuse_placeholder(checkpoint / name)
            written.append(Path(shutil.copyfile(checkpoint / name, output / name)))
    path = output / CONFIG_FILE
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return [*written, path]
