"""What the tokenizers of all generations share.

They are ordinary Hugging Face tokenizers (transformers 4.48 to 5.x): padding is on the left, and the model inputs are
input_ids, attention_mask and position_ids. Encoding and decoding are done by sentencepiece or tiktoken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy

from chatglm_ov.chat import chat_format_for
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer.files import MARKER
from chatglm_ov.tokenizer.stream import CleanUp, id_list

# Ids behind the vocabulary up to the next multiple of this are the padding rows of an embedding: they have no text.
_ROW_MULTIPLE = 1024
_RETURN_DICT: bool = inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters["return_dict"].default


class GLMTokenizer(PreTrainedTokenizer):
    """Base class. A constructor of a subclass takes the file with `_read_model`, sets `_vocab` (token to id, without
    added tokens) and ends with `_finish_init`."""

    family: str
    PREFIX_TOKENS: tuple[str, ...] = ()
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012 (declared so by the base class)
    padding_side = "left"
    _vocab: dict[str, int]

    def _read_model(self, vocab_file: str) -> None:
        self.vocab_file = vocab_file
        self._model_bytes = Path(vocab_file).read_bytes()
        self._build_encoder()

    def _finish_init(self, saved: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
        """`saved` are the constructor arguments that tokenizer_config.json must carry besides the library's own."""
        if kwargs.get("padding_side", "left") != "left":
            self._wrong_padding_side(kwargs["padding_side"])
        for key in ("tokenizer_class", "auto_map", "model_specific_special_tokens", MARKER):
            kwargs.pop(key, None)
        super().__init__(**kwargs)
        self.init_kwargs |= {MARKER: self.family, **saved}

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return self._vocab | self._added_tokens_encoder

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is a special token, nothing added."""
        raise NotImplementedError

    def get_prefix_tokens(self) -> list[int]:
        ids: Any = self.convert_tokens_to_ids(list(self.PREFIX_TOKENS))
        return ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for the ids that `build_inputs_with_special_tokens` adds, 0 for the others."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        mask = self._mask_of_first(len(token_ids_0))
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def _mask_of_first(self, length: int) -> list[int]:
        return [1] * len(self.PREFIX_TOKENS) + [0] * length

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token, self._vocab.get("<unk>"))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = self.vocab_files_names["vocab_file"]
        path = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        path.write_bytes(self._model_bytes)
        return (str(path),)

    # ---- decoding

    def _checked_ids(self, token_ids: Any, method: str = "decode") -> list[int]:
        """A list of ids that the vocabulary (or a padding row behind it) has."""
        where = f"{type(self).__name__}.{method}"
        ids = id_list(token_ids, where)
        if ids and not 0 <= min(ids) <= max(ids) < self._rows():
            wrong = next(i for i in ids if not 0 <= i < self._rows())
            raise ChatGLMError(where, "token id", f"{wrong} at index {ids.index(wrong)}", f"0 to {len(self) - 1}")
        return ids

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """As in Hugging Face. An id of a padding row behind the vocabulary has the token ""."""
        checked, size = self._checked_ids(ids, "convert_ids_to_tokens"), len(self)
        if all(index < size for index in checked):
            return super().convert_ids_to_tokens(ids if isinstance(ids, int) else checked, skip_special_tokens)
        if isinstance(ids, int):
            return ""
        convert, skipped = super().convert_ids_to_tokens, set(self.all_special_ids if skip_special_tokens else ())
        return ["" if index >= size else convert(index) for index in checked if index not in skipped]

    def _rows(self) -> int:
        return -(-len(self) // _ROW_MULTIPLE) * _ROW_MULTIPLE

    def _kept_ids(self, token_ids: Any, skip_special_tokens: bool) -> list[int]:
        """The checked ids less those without any trace in the text."""
        skipped = self._skipped_ids(skip_special_tokens)
        size = len(self)
        return [i for i in self._checked_ids(token_ids) if i not in skipped and i < size]

    def _has_text(self, token_id: int, skipped: set[int]) -> bool:
        """`_kept_ids` for a single id."""
        if not 0 <= token_id < len(self):
            self._checked_ids(token_id)
            return False
        return token_id not in skipped

    def _skipped_ids(self, skip_special_tokens: bool) -> set[int]:
        return set(self.all_special_ids) if skip_special_tokens else set()

    def _added_text(self, token_id: int) -> str:
        """Text of a token that came on top of the vocabulary."""
        return self._added_tokens_decoder[token_id].content

    def _cleaned(self, text: str, clean_up: bool | None) -> str:
        clean_up = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return CleanUp.replace(text) if clean_up else text

    # ---- padding

    def _wrong_padding_side(self, side: Any) -> None:
        raise ChatGLMError(type(self).__name__, "padding_side", repr(side), "'left'")

    def _missing(
        self,
        length: int,
        max_length: int | None,
        strategy: PaddingStrategy,
        multiple: int | None,
        side: str | None,
    ) -> int:
        """How many padding ids a row of `length` ids needs."""
        if (side or self.padding_side) != "left":
            self._wrong_padding_side(side or self.padding_side)
        if strategy == PaddingStrategy.DO_NOT_PAD:
            return 0
        target = length if strategy == PaddingStrategy.LONGEST or max_length is None else max_length
        target = -(-target // multiple) * multiple if multiple else target
        return max(0, target - length)

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> Any:
        """Completes one row (a dict of lists) with attention_mask (1 = token, 0 = padding) and position_ids (0 in the
        padding, the first token has 0 too), and pads all of it on the left."""
        ids = encoded_inputs["input_ids"]
        missing = self._missing(len(ids), max_length, padding_strategy, pad_to_multiple_of, padding_side)
        encoded_inputs.setdefault("attention_mask", [1] * len(ids))
        encoded_inputs.setdefault("position_ids", list(range(len(ids))))
        self._pad_lists(encoded_inputs, missing)
        for key in ("attention_mask", "position_ids"):
            encoded_inputs[key] = [0] * missing + list(encoded_inputs[key])
        return encoded_inputs

    def _pad_lists(self, row: Any, missing: int) -> None:
        fill = {
            "input_ids": self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        for key, value in fill.items():
            if key in row:
                row[key] = [value] * missing + list(row[key])

    # ---- chat

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[dict] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = _RETURN_DICT,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Text or ids of a conversation (a list of messages with role and content, or a list of such lists) in the
        generation's own chat format: the ids that `chat()` sends to the model.

        `options`: padding, pad_to_multiple_of, padding_side, truncation, max_length, return_tensors as in the tokenizer
        call; others, which a template would get, have no effect. `return_dict` is by default
        what it is in the installed transformers (4: False, a list or tensor of ids; 5: True). The arguments that need a
        free template (documents, chat_template, return_assistant_tokens_mask) are refused. `continue_final_message`:
        the last message, an answer, is left open for the model to go on with.
        """
        for name in ("documents", "chat_template", "return_assistant_tokens_mask"):
            if options.get(name):
                seen = _kind(options[name])
                raise ChatGLMError("apply_chat_template", name, seen, "not given: the chat format is fixed")
        batched, conversations = _conversations(conversation)
        if continue_final_message and add_generation_prompt:
            wanted = "False with continue_final_message: either an answer begins or one goes on"
            raise ChatGLMError("apply_chat_template", "add_generation_prompt", True, wanted)
        chat = chat_format_for(self)
        text: Callable[..., str]
        ids: Callable[..., list[int]]
        if continue_final_message:
            text, ids = chat.continued_text, chat.continued_ids
        else:
            text = partial(chat.conversation_text, add_generation_prompt=add_generation_prompt)
            ids = partial(chat.conversation_ids, add_generation_prompt=add_generation_prompt)
        if not tokenize:
            texts = [text(self, each, tools) for each in conversations]
            return texts if batched else texts[0]
        rows = [ids(self, each, tools) for each in conversations]
        encoded = self._encode_rows(rows, batched, **options | (tokenizer_kwargs or {}))
        return encoded if return_dict else encoded["input_ids"]

    def _encode_rows(
        self,
        rows: list[list[int]],
        batched: bool,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        **unused: Any,
    ) -> BatchEncoding:
        """Rows of ids as the tokenizer call would give them for texts, without adding special tokens."""
        if (padding_side or self.padding_side) != "left":
            self._wrong_padding_side(padding_side or self.padding_side)
        if truncation and truncation != "do_not_truncate":
            most = self.model_max_length if max_length is None else max_length
            rows = [row[-most:] if self.truncation_side == "left" else row[:most] for row in rows]
        if batched or padding:
            encoded = self.pad(
                {"input_ids": rows}, padding=padding, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of
            )
        else:
            encoded = self.pad({"input_ids": rows[0]}, padding=False)
        if padding and not batched:
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        return BatchEncoding(encoded.data, tensor_type=return_tensors, prepend_batch_axis=not batched)

    # ---- pickling: the encoders hold C++ objects, so they are built again from the file's bytes

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_encoder"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build_encoder()

    def _build_encoder(self) -> None:
        """Makes `_encoder` from `_model_bytes`."""
        raise NotImplementedError


def _conversations(conversation: Any) -> tuple[bool, list[list[dict]]]:
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ChatGLMError("apply_chat_template", "conversation", _kind(conversation), "a list of messages, not empty")
    batched = isinstance(conversation[0], (list, tuple))
    return batched, list(conversation) if batched else [list(conversation)]


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"


def added_tokens(config: Any, first_id: int) -> dict[int, AddedToken]:
    """The `added_tokens_decoder` of a tokenizer_config.json from id `first_id` on: the vocabulary ends there."""
    try:
        return {
            int(key): token if isinstance(token, AddedToken) else AddedToken(**token)
            for key, token in (config or {}).items()
            if int(key) >= first_id
        }
    except (TypeError, ValueError, AttributeError) as error:
        seen = f"one that cannot be read ({error})"
        raise ChatGLMError("tokenizer_config.json", "added_tokens_decoder", seen, "tokens by id") from None
