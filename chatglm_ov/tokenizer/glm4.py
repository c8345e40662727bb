"""Tokenizer of GLM-4-9B: byte-level BPE by tiktoken, file tokenizer.model of lines `base64(bytes) rank`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import tiktoken
from transformers import AddedToken

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer.base import GLMTokenizer, added_tokens
from chatglm_ov.tokenizer.files import MODEL_FILE
from chatglm_ov.tokenizer.ranks import read_ranks
from chatglm_ov.tokenizer.stream import ByteDecoder, CleanUp, Decoder, byte_characters

# Words, numbers of up to 3 digits, punctuation, line ends, blanks: the published split of GLM-4.
_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# tiktoken's regular expressions end the process with a panic at a run of more than a million.
_LONG_WHITESPACE = re.compile(r"\s{500000}")
# In the order of their ids, from the number of ranks on.
_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


class ChatGLM4Tokenizer(GLMTokenizer):
    """[gMASK] + `<sop>` + ids (a pair: ... + ids of the second + `<|endoftext|>`).

    Special tokens are recognised in a text, and stand between blanks in a decoded one
    (`spaces_between_special_tokens=False` leaves the blanks out). A token as text is written with one printable
    character per byte, as byte-level vocabularies are.
    """

    family = "glm4"
    PREFIX_TOKENS = ("[gMASK]", "<sop>")
    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        self._read_model(vocab_file)
        character = byte_characters()
        self._tokens = ["".join(map(character.__getitem__, token)) for token in self._ranks]
        self._vocab = {token: rank for rank, token in enumerate(self._tokens)}
        special = self._special_tokens(kwargs.pop("added_tokens_decoder", None))
        for key in ("extra_special_tokens", "additional_special_tokens"):
            kwargs.pop(key, None)
        kwargs["additional_special_tokens"] = [token.content for token in special.values() if token.special]
        kwargs["added_tokens_decoder"] = special
        kwargs = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | kwargs
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        self._finish_init({}, kwargs)

    def _build_encoder(self) -> None:
        ranks = read_ranks(self._model_bytes, self.vocab_file)
        self._ranks = list(ranks)
        self._encoder = tiktoken.Encoding("glm4", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={})

    def _special_tokens(self, config: Any) -> dict[int, AddedToken]:
        """Special tokens by id: those of tokenizer_config.json, else the published ones."""
        count = len(self._ranks)
        special = added_tokens(config, 0)
        if special and min(special) != count:
            raise ChatGLMError(
                self.vocab_file, "number of tokens", count, f"{min(special)}, the first id of added_tokens_decoder"
            )
        published = (AddedToken(token, normalized=False, special=True) for token in _SPECIAL)
        return special or dict(enumerate(published, count))

    # ---- encoding

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[rank] for rank in self.encode_ordinary(text)]

    def encode_ordinary(self, text: str) -> list[int]:
        ids, start = [], 0
        for run in _LONG_WHITESPACE.finditer(text):
            ids += self._encoder.encode_ordinary(text[start : run.end()])
            start = run.end()
        return ids + self._encoder.encode_ordinary(text[start:])

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    # ---- decoding

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of token strings; special tokens among them give their own."""
        return "".join(
            self._run_text([self._vocab[token] for token in run]) if ordinary else "".join(run)
            for ordinary, run in groupby(tokens, self._vocab.__contains__)
        )

    def _run_text(self, ranks: Iterable[int]) -> str:
        return b"".join(map(self._ranks.__getitem__, ranks)).decode("utf-8", "replace")

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        parts: list[str] = []
        for added, run in groupby(self._kept_ids(token_ids, skip_special_tokens), len(self._ranks).__le__):
            ids = list(run)
            parts += map(self._added_text, ids) if added else [self._run_text(ids)]
        text = (" " if spaces_between_special_tokens else "").join(parts)
        return self._cleaned(text, clean_up_tokenization_spaces)

    def stream_decoders(self, skip_special_tokens: bool) -> tuple[Callable[[int], bytes | str | None], list[Decoder]]:
        skipped = self._skipped_ids(skip_special_tokens)

        def token(token_id: int) -> bytes | str | None:
            if not self._has_text(token_id, skipped):
                return None
            return self._ranks[token_id] if token_id < len(self._ranks) else self._added_text(token_id)

        clean = [CleanUp()] if self.clean_up_tokenization_spaces else []
        return token, [ByteDecoder(" "), *clean]
