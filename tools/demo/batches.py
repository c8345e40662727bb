"""The order of the training data: conversations, drawn and batched reproducibly."""

import random

import torch
from torch import Tensor

from .corpus import Asker, Poem
from .vocabulary import IGNORED, ChatVocabulary

BATCH_TOKENS = 2048
BATCHES_PER_BLOCK = 128
SHARE_START, SHARE_END = 0.35, 0.55
RISE_START, RISE_END = 640, 1280
SEVERAL_TURNS, MANY_TURNS = 0.12, 0.02


class Cycle:
    """Endless passes over a list, each in a new order."""

    def __init__(self, items: list, rng: random.Random):
        self.items, self.rng, self.left = items, rng, []

    def draw(self):
        if not self.left:
            self.left = list(range(len(self.items)))
            self.rng.shuffle(self.left)
        return self.items[self.left.pop()]


def anthology_share(step: int) -> float:
    """Share of anthology poems among the turns: lower while the language is learned, then higher, to learn by heart."""
    risen = (step - RISE_START) / (RISE_END - RISE_START)
    return SHARE_START + (SHARE_END - SHARE_START) * min(1.0, max(0.0, risen))


class ConversationStream:
    """Batches of at most BATCH_TOKENS padded tokens, all rows of a batch of about the same length.

    `state()` and `load_state()` make a continued run see the data that an unbroken one sees.
    """

    def __init__(
        self, anthology: list[Poem], poems: list[Poem], vocabulary: ChatVocabulary, seq_length: int, seed: int
    ):
        self.rng = random.Random(seed)
        self.cycles = (Cycle(anthology, self.rng), Cycle(poems, self.rng))
        self.askers = (Asker(anthology, title_alone=True), Asker(poems, title_alone=False))
        self.vocabulary, self.seq_length = vocabulary, seq_length
        self.queue: list[list[tuple[list[int], list[int]]]] = []

    def state(self) -> dict:
        return {
            "rng": self.rng.getstate(),
            "left": [cycle.left for cycle in self.cycles],
            "queue": self.queue,
        }

    def load_state(self, state: dict) -> None:
        self.rng.setstate(state["rng"])
        for cycle, left in zip(self.cycles, state["left"], strict=True):
            cycle.left = left
        self.queue = state["queue"]

    def turn(self, share: float) -> tuple[str, str]:
        which = 0 if self.rng.random() < share else 1
        return self.askers[which].ask(self.cycles[which].draw(), self.rng)

    def conversation(self, share: float) -> tuple[list[int], list[int]]:
        """One turn mostly; some of 2 to 4 turns, and a few that fill the whole context."""
        kind = self.rng.random()
        turns = 64 if kind < MANY_TURNS else self.rng.randint(2, 4) if kind < MANY_TURNS + SEVERAL_TURNS else 1
        said = [self.turn(share)]
        ids, labels = self.vocabulary.conversation(said)
        for _ in range(turns - 1):
            longer = self.vocabulary.conversation([*said, turn := self.turn(share)])
            if len(longer[0]) > self.seq_length:
                break
            said.append(turn)
            ids, labels = longer
        return ids, labels

    def fill(self, step: int) -> None:
        share, tokens, drawn = anthology_share(step), 0, []
        while tokens < BATCHES_PER_BLOCK * BATCH_TOKENS:
            drawn.append(self.conversation(share))
            tokens += len(drawn[-1][0])
        drawn.sort(key=lambda pair: len(pair[0]), reverse=True)
        while drawn:
            rows = max(1, BATCH_TOKENS // len(drawn[0][0]))
            self.queue.append(drawn[:rows])
            drawn = drawn[rows:]
        self.rng.shuffle(self.queue)

    def next(self, step: int) -> tuple[Tensor, Tensor]:
        """Input ids and labels [rows, length], padded at the right; padding has the label IGNORED."""
        if not self.queue:
            self.fill(step)
        return pad_rows(self.queue.pop())


def pad_rows(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels
