"""What the sentencepiece tokenizers of v1, ChatGLM2 and ChatGLM3 share."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor

from chatglm_ov.tokenizer.base import GLMTokenizer
from chatglm_ov.tokenizer.sentencepiece_model import load_sentencepiece
from chatglm_ov.tokenizer.stream import SPACE, CleanUp, Decoder, PieceDecoder
from chatglm_ov.unicode import whole_characters

# A piece for `stream_decoders`: bytes of a byte piece, (text, is a piece of the model), None for nothing at all.
Item = bytes | tuple[str, bool] | None


class PieceTokenizer(GLMTokenizer):
    """`_encoder` is a SentencePieceProcessor, `_pieces` its pieces by id."""

    def _build_encoder(self) -> None:
        self._encoder = self._load_model()
        self._pieces: list[str] = self._encoder.id_to_piece(list(range(self._encoder.vocab_size())))

    def _load_model(self) -> SentencePieceProcessor:
        return load_sentencepiece(self._model_bytes, self.vocab_file)

    def _encode_pieces(self, text: str) -> list[str]:
        """Pieces of `text`; half a surrogate pair, which UTF-8 cannot hold, counts as U+FFFD."""
        return self._encoder.encode(whole_characters(text), out_type=str)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._encoder.decode_pieces(tokens) if tokens else ""

    def _piece_decoders(self, *between: Decoder) -> list[Decoder]:
        pieces = PieceDecoder(all_blanks=self._encoder.decode_pieces([SPACE, SPACE]) == "")
        return [pieces, *between, *([CleanUp()] if self.clean_up_tokenization_spaces else [])]

    def _stream_item(self, piece_id: int) -> Item:
        """What piece `piece_id` of the model puts into a text."""
        sp = self._encoder
        if sp.is_byte(piece_id):
            return bytes([int(self._pieces[piece_id][3:5], 16)])
        if sp.is_control(piece_id):
            return "", False
        if sp.is_unknown(piece_id):
            return sp.decode_pieces([self._pieces[piece_id]]), False
        return self._pieces[piece_id], True
