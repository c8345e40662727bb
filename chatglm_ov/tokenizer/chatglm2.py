"""Tokenizers of ChatGLM2-6B and ChatGLM3-6B: sentencepiece BPE, file tokenizer.model, the same for both."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import AddedToken, BatchEncoding

from chatglm_ov.chat import chat_format_for
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer.base import added_tokens
from chatglm_ov.tokenizer.files import MODEL_FILE
from chatglm_ov.tokenizer.pieces import Item, PieceTokenizer
from chatglm_ov.tokenizer.stream import Decoder

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_WORDS = ("sop", "eop")
_BEHIND_GMASK = r"(?<=\[gMASK\])"


def _pattern(token: AddedToken) -> str:
    """Where the token is one."""
    name = _BEHIND_GMASK * (token.content in _WORDS) + re.escape(token.content)
    return rf"(?<!\w){name}(?!\w)" if token.single_word else name


class ChatGLM2Tokenizer(PieceTokenizer):
    """[gMASK] + sop + ids (a pair: ... + ids of the second + `</s>`).

    The special tokens stand behind the sentencepiece vocabulary. Only those that `added_tokens_decoder` of
    tokenizer_config.json declares are recognised in a text, as later releases do for their chat template's text: of
    `sop` and `eop`, which are letters of words, those directly behind [gMASK]. None has text when decoded.
    """

    family = "chatglm2"
    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012
    PREFIX_TOKENS = ("[gMASK]", "sop")
    SPECIAL_TOKENS: tuple[str, ...] = _SPECIAL

    def __init__(self, vocab_file: str, **kwargs: Any):
        self._read_model(vocab_file)
        self._vocab = {token: index for index, token in enumerate([*self._pieces, *self.SPECIAL_TOKENS])}
        kwargs |= {"unk_token": "<unk>", "pad_token": "<unk>", "eos_token": "</s>"}
        kwargs["added_tokens_decoder"] = self._declared(kwargs.get("added_tokens_decoder"))
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        self._finish_init(self._saved_arguments(), kwargs)

    def _saved_arguments(self) -> dict[str, Any]:
        return {}

    def _declared(self, config: Any) -> dict[int, AddedToken]:
        """The tokens of an `added_tokens_decoder` behind the pieces, less those that give a special token's id to
        another text."""
        return {
            index: token
            for index, token in added_tokens(config, len(self._pieces)).items()
            if index >= self.vocab_size or self._vocab.get(token.content) == index
        }

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """The library would look for every token that is added here in the text; the vocabulary's own are not."""
        return super()._add_tokens([token for token in new_tokens if str(token) not in self._vocab], special_tokens)

    def get_command(self, token: str) -> int:
        """Id of a special token, by its name in the original tokenizers ("<eos>" and the like are accepted too)."""
        aliases = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"}
        if token not in aliases and token not in self.SPECIAL_TOKENS:
            raise ChatGLMError("get_command", "token", repr(token), ", ".join(self.SPECIAL_TOKENS))
        return self._vocab[aliases.get(token, token)]

    # ---- encoding

    def tokenize(  # type: ignore[override]
        self, text: str, split_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[str]:
        """Pieces of `text`. Tokens that were added or declared are looked for, unless `split_special_tokens`; other
        special tokens are not."""
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        if split or not self._added_tokens_encoder:
            return self._encode_pieces(text)
        added = {token.content: token for token in self._added_tokens_decoder.values()}
        between, *rest = re.split(self._added_pattern(), text)
        tokens: list[str] = []
        for name, behind in zip(rest[::2], rest[1::2], strict=True):
            tokens += [*self._encode_pieces(between.rstrip() if added[name].lstrip else between), name]
            between = behind.lstrip() if added[name].rstrip else behind
        return tokens + self._encode_pieces(between)

    def _added_pattern(self) -> str:
        """A pattern of the added tokens; of several that begin at one place it finds the longest."""
        tokens = sorted(self._added_tokens_decoder.values(), key=lambda token: len(token.content), reverse=True)
        return f"({'|'.join(map(_pattern, tokens))})"

    def encode_ordinary(self, text: str) -> list[int]:
        return [self._vocab[piece] for piece in self._encode_pieces(text)]

    def _convert_id_to_token(self, index: int) -> str:
        special = index - len(self._pieces)
        return self._pieces[index] if special < 0 else self.SPECIAL_TOKENS[special]

    def build_prompt(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        """Text of the round that asks `query`, as the original tokenizer's method of this name."""
        return chat_format_for(self).prompt(query, history or [])  # type: ignore[attr-defined]

    # ---- decoding

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        tokens = map(self._decoded_token, self._kept_ids(token_ids, skip_special_tokens))
        return self._cleaned(self.convert_tokens_to_string(list(tokens)), clean_up_tokenization_spaces)

    def _decoded_token(self, index: int) -> str:
        """What an id gives to the decoder: nothing for unknown, begin, end and special tokens."""
        if index in (self._encoder.unk_id(), self._encoder.bos_id(), self._encoder.eos_id()):
            return ""
        if index < len(self._pieces):
            return self._pieces[index]
        return self._special_text(index) if index < self.vocab_size else self._added_text(index)

    def _special_text(self, index: int) -> str:
        return ""

    def stream_decoders(self, skip_special_tokens: bool) -> tuple[Callable[[int], Item], list[Decoder]]:
        skipped = self._skipped_ids(skip_special_tokens)

        def token(token_id: int) -> Item:
            if not self._has_text(token_id, skipped):
                return None
            text = self._decoded_token(token_id)
            return self._stream_item(token_id) if text and token_id < len(self._pieces) else (text, False)

        return token, self._piece_decoders()


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM2's plus four role tokens. Special tokens have text when decoded. With `encode_special_tokens` (of the
    constructor, or of a call) the role tokens, and only they, are recognised in a text."""

    family = "chatglm3"
    SPECIAL_TOKENS = (*_SPECIAL, *_ROLES)
    _ROLE = re.compile("(" + "|".join(map(re.escape, _ROLES)) + ")")

    def __init__(self, vocab_file: str, encode_special_tokens: bool = False, **kwargs: Any):
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, **kwargs)

    def _saved_arguments(self) -> dict[str, Any]:
        return {"encode_special_tokens": self.encode_special_tokens}

    def tokenize(  # type: ignore[override]
        self, text: str, encode_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[str]:
        split = self.encode_special_tokens if encode_special_tokens is None else encode_special_tokens
        if not split:
            return super().tokenize(text, **kwargs)
        tokens: list[str] = []
        for part in filter(None, self._ROLE.split(text)):
            tokens += [part] if part in _ROLES else super().tokenize(part, **kwargs)
        return tokens

    def _special_text(self, index: int) -> str:
        return self._convert_id_to_token(index)

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Ids of one message of a conversation."""
        head = self.encode_ordinary(f"{metadata}\n")
        return [self.get_command(f"<|{role}|>"), *head, *self.encode_ordinary(message)]

    def build_chat_input(self, query: str, history: list[dict] | None = None, role: str = "user") -> BatchEncoding:
        """Tensors [1, n] of the prompt that asks `query` after `history`."""
        ids = chat_format_for(self).build_inputs(self, query, history, role)
        return self._encode_rows([ids], batched=False, return_tensors="pt")
