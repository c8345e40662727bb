"""A vocabulary in the ChatGLM3 tokenizer format, and ChatGLM3's chat ids made with it."""

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

SPECIALS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
EOS = 2
IGNORED = -100


def choose_characters(required: Iterable[str], texts: Iterable[str], count: int) -> set[str]:
    """All characters of `required`, filled up to `count` with the most frequent ones of `texts`."""
    chosen = {char for text in required for char in text if not char.isspace()}
    frequent = Counter(char for text in texts for char in text if not char.isspace())
    for char, _ in sorted(frequent.items(), key=lambda item: (-item[1], item[0])):
        if len(chosen) >= count:
            break
        chosen.add(char)
    return chosen


def train_vocabulary(texts: Iterable[str], characters: set[str], size: int) -> bytes:
    """A sentencepiece BPE model of `size` pieces: unk, bos, eos, 256 bytes, merges, all of `characters`.

    The settings are those of ChatGLM3's tokenizer.model: identity normalizer, dummy prefix, byte fallback, digits
    apart, whitespace kept.
    """
    kept = characters | {" "}
    sentences = ("".join(char for char in text if char in kept) for text in texts)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(sentence for sentence in sentences if sentence),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        required_chars="".join(sorted(characters)),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        max_sentence_length=16384,
        max_sentencepiece_length=16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


class ChatVocabulary:
    """ChatGLM3's `build_chat_input` ids: specials follow the sentencepiece ids, each body is encoded by itself."""

    def __init__(self, model: bytes | Path):
        data = model if isinstance(model, bytes) else model.read_bytes()
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.special = {token: self.pieces.get_piece_size() + index for index, token in enumerate(SPECIALS)}
        self.newline = self.pieces.encode("\n")

    def __len__(self) -> int:
        return self.pieces.get_piece_size() + len(SPECIALS)

    def prefix(self) -> list[int]:
        return [self.special["[gMASK]"], self.special["sop"]]

    def question(self, prompt: str) -> list[int]:
        """Ids of a user turn and of the role token that asks for the answer."""
        return [
            self.special["<|user|>"],
            *self.newline,
            *self.pieces.encode(prompt),
            self.special["<|assistant|>"],
        ]

    def answer(self, text: str) -> list[int]:
        """Ids of what the assistant says, empty metadata line first, without an end token."""
        return [*self.newline, *self.pieces.encode(text)]

    def prompt(self, prompt: str) -> list[int]:
        return [*self.prefix(), *self.question(prompt)]

    def conversation(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Input ids and labels of one length: label i is what should follow input i, or IGNORED.

        The label at the end of every answer is the end token, also where another user turn follows in the input.
        """
        ids, labels = self.prefix(), [IGNORED] * 2
        for prompt, text in turns:
            question, answer = self.question(prompt), self.answer(text)
            ids += question + answer
            labels += [IGNORED] * (len(question) - 1) + answer + [EOS]
        return ids, labels
