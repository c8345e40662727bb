"""Tokenizer of ChatGLM-6B (v1): sentencepiece unigram, file ice_text.model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from transformers import AddedToken
from transformers.utils import PaddingStrategy

from chatglm_ov.tokenizer.base import added_tokens
from chatglm_ov.tokenizer.files import V1_FILE
from chatglm_ov.tokenizer.pieces import Item, PieceTokenizer
from chatglm_ov.tokenizer.sentencepiece_model import MAX_BLANKS, load_sentencepiece, with_v1_special_pieces
from chatglm_ov.tokenizer.stream import Decoder, WhitespaceTokens

_BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")
_DEFAULTS = {
    "unk_token": "<unk>",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}


class ChatGLMTokenizer(PieceTokenizer):
    """ids + [gMASK] + `<sop>` (a pair: ... + ids of the second + `<eop>`).

    Newline, tab and runs of blanks are tokens of their own. The special tokens of `_DEFAULTS` are recognised in a text
    and swallow the whitespace around them; [gMASK] typed in a text stays text. `num_image_tokens` ids stand before the
    text vocabulary (20000 in early checkpoints, whose file also lacks the special pieces: they are added here).
    """

    family = "chatglm"
    vocab_files_names = {"vocab_file": V1_FILE}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        num_image_tokens: int = 20000,
        gmask_token: str = "[gMASK]",
        end_token: str = "</s>",
        eop_token: str | None = None,
        remove_space: bool = False,
        do_lower_case: bool = False,
        clean_up_tokenization_spaces: bool = True,
        **kwargs: Any,
    ):
        self._read_model(vocab_file)
        self.num_image_tokens, self.gmask_token, self.end_token = num_image_tokens, gmask_token, end_token
        self._remove_space, self._lower_case = remove_space, do_lower_case
        images = {f"<image_{index}>": index for index in range(num_image_tokens)}
        self._vocab = images | {piece: num_image_tokens + index for index, piece in enumerate(self._pieces)}
        # Early configs call the end of an answer eop_token, and `</s>` the eos_token.
        names = _DEFAULTS | {key: kwargs.pop(key) for key in _DEFAULTS if kwargs.get(key)}
        names["eos_token"] = eop_token or names["eos_token"]
        swallow = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
        special = {key: AddedToken(str(name), **swallow) for key, name in names.items()}
        known = {self._vocab[token.content]: token for token in special.values() if token.content in self._vocab}
        kwargs |= special
        kwargs["added_tokens_decoder"] = known | added_tokens(kwargs.get("added_tokens_decoder"), self.vocab_size)
        saved = {
            "num_image_tokens": num_image_tokens,
            "gmask_token": gmask_token,
            "end_token": end_token,
            "remove_space": remove_space,
            "do_lower_case": do_lower_case,
        }
        kwargs["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        self._finish_init(saved, kwargs)

    def _load_model(self) -> SentencePieceProcessor:
        model = super()._load_model()
        if model.piece_to_id("[gMASK]") != model.unk_id():
            return model
        return load_sentencepiece(with_v1_special_pieces(self._model_bytes), self.vocab_file)

    @property
    def gmask_token_id(self) -> int:
        return self._vocab[self.gmask_token]

    # ---- encoding

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self._remove_space:
            text = " ".join(text.split())
        if self._lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return self._encode_pieces(_BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text))

    def encode_ordinary(self, text: str) -> list[int]:
        return [self._vocab[piece] for piece in self._tokenize(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab.get(token, self.num_image_tokens + self._encoder.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        piece_id = index - self.num_image_tokens
        return f"<image_{index}>" if piece_id < 0 else self._pieces[piece_id]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def _mask_of_first(self, length: int) -> list[int]:
        return [0] * length + [1, 1]

    # ---- decoding

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Padding is dropped, control pieces have no text, blanks before ASCII punctuation go by default."""
        tokens = self.convert_ids_to_tokens(self._kept_ids(token_ids, skip_special_tokens))
        return self._cleaned(self.convert_tokens_to_string(tokens), clean_up_tokenization_spaces)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return WhitespaceTokens.replace(super().convert_tokens_to_string(tokens))

    def _skipped_ids(self, skip_special_tokens: bool) -> set[int]:
        return {self.pad_token_id, *super()._skipped_ids(skip_special_tokens)}

    def stream_decoders(self, skip_special_tokens: bool) -> tuple[Callable[[int], Item], list[Decoder]]:
        skipped = self._skipped_ids(skip_special_tokens)

        def token(token_id: int) -> Item:
            if not self._has_text(token_id, skipped):
                return None
            if token_id >= self.vocab_size:
                return self._added_text(token_id), False
            piece_id = token_id - self.num_image_tokens
            return (f"<image_{token_id}>", False) if piece_id < 0 else self._stream_item(piece_id)

        return token, self._piece_decoders(WhitespaceTokens())

    # ---- padding

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> Any:
        """When a length is asked for: attention_mask bool [1, n, n], True = blocked, and position_ids int64 [2, n]
        (row 0 position, row 1 block position), both for the padded length n. Otherwise input_ids alone."""
        ids = encoded_inputs["input_ids"]
        missing = self._missing(len(ids), max_length, padding_strategy, pad_to_multiple_of, padding_side)
        if max_length is not None or padding_strategy != PaddingStrategy.DO_NOT_PAD:
            context = ids.index(self.bos_token_id) if self.bos_token_id in ids else len(ids)
            encoded_inputs.setdefault("attention_mask", self._blocked(len(ids), context))
            encoded_inputs.setdefault("position_ids", self._positions(ids, context))
            mask, positions = np.array(encoded_inputs["attention_mask"]), np.array(encoded_inputs["position_ids"])
            encoded_inputs["attention_mask"] = np.pad(mask, [(0, 0), (missing, 0), (missing, 0)], constant_values=True)
            encoded_inputs["position_ids"] = np.pad(positions, [(0, 0), (missing, 0)])
        self._pad_lists(encoded_inputs, missing)
        return encoded_inputs

    @staticmethod
    def _blocked(length: int, context: int) -> np.ndarray:
        """[1, n, n]: column j is blocked for row i where j > i and j is not in the context before `<sop>`."""
        column = np.arange(length)
        return ((column > column[:, None]) & (column >= context))[None]

    def _positions(self, ids: list[int], context: int) -> np.ndarray:
        """[2, n]: from `<sop>` on, the position of the mask token ([MASK] where both kinds occur) and 1, 2, 3, ..."""
        position = np.arange(len(ids), dtype=np.int64)
        mask = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id
        if mask in ids:
            position[context:] = ids.index(mask)
        block = np.maximum(np.arange(len(ids), dtype=np.int64) - context + 1, 0)
        return np.stack([position, block])
