"""What the model can do: poems recited by greedy decoding, and perplexity of held-out poems."""

from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .batches import pad_rows
from .corpus import CANONICAL, Poem, with_opening
from .model import ChatGLM3
from .vocabulary import EOS, IGNORED, ChatVocabulary

ROWS = 32


def name_prompt(poem: Poem) -> str:
    return CANONICAL.format(title=poem.title, author=poem.author)


def canonical_prompts(poems: list[Poem]) -> list[str]:
    """The canonical prompt of every poem; a second one of the same title and author is named with its opening."""
    seen: set[tuple[str, str]] = set()
    prompts = []
    for poem in poems:
        prompts.append(with_opening(poem) if poem.key in seen else name_prompt(poem))
        seen.add(poem.key)
    return prompts


def batches_by_length(rows: list, length) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: length(rows[index]))
    return [order[start : start + ROWS] for start in range(0, len(order), ROWS)]


@torch.no_grad()
def token_losses(
    model: ChatGLM3, vocabulary: ChatVocabulary, turns: list[tuple[str, str]]
) -> list[tuple[Tensor, Tensor]]:
    """For every (prompt, answer): loss and correctness (argmax is the label) of each answer token and the end."""
    rows = [vocabulary.conversation([turn]) for turn in turns]
    results: list = [None] * len(rows)
    for batch in batches_by_length(rows, lambda row: len(row[0])):
        ids, labels = pad_rows([rows[index] for index in batch])
        hidden = model.hidden(ids)
        for row, index in enumerate(batch):
            wanted = labels[row] != IGNORED
            logits, label = model.logits(hidden[row][wanted]).float(), labels[row][wanted]
            results[index] = (F.cross_entropy(logits, label, reduction="none"), logits.argmax(-1) == label)
    return results


def forced_recitals(model: ChatGLM3, vocabulary: ChatVocabulary, poems: list[Poem]) -> int:
    """Poems of which every answer token is the most probable one: what greedy decoding recites, in one pass."""
    turns = list(zip(canonical_prompts(poems), (poem.text for poem in poems), strict=True))
    return sum(bool(right.all()) for _, right in token_losses(model, vocabulary, turns))


def perplexity(model: ChatGLM3, vocabulary: ChatVocabulary, poems: list[Poem]) -> tuple[float, float]:
    """(per token, per character) of the poems' text, given the canonical prompt with title and author.

    Counted are the ids of encode(text) that follow the empty metadata line, the dummy-prefix piece among them,
    and the end token. The same sum of losses over the number of characters gives the second figure.
    """
    turns = [(name_prompt(poem), poem.text) for poem in poems]
    skipped = len(vocabulary.newline)
    losses = [loss[skipped:] for loss, _ in token_losses(model, vocabulary, turns)]
    total = sum(float(loss.double().sum()) for loss in losses)
    return exp(total / sum(map(len, losses))), exp(total / sum(len(poem.text) for poem in poems))


@torch.no_grad()
def generate(model: ChatGLM3, vocabulary: ChatVocabulary, prompts: list[str], lengths: list[int]) -> list[str]:
    """Greedy answers to the prompts, decoded with a key/value cache in left-padded batches.

    `lengths` are the expected answers' characters: answers of about one length share a batch, and one that is much
    longer is cut off.
    """
    rows = [vocabulary.prompt(prompt) for prompt in prompts]
    answers = [""] * len(prompts)
    for batch in tqdm(batches_by_length(lengths, lambda length: length), desc="reciting", unit="batch"):
        limit = 32 + 2 * max(lengths[index] for index in batch)
        for index, ids in zip(batch, generate_batch(model, [rows[index] for index in batch], limit), strict=True):
            spoken = [token for token in ids if token < len(vocabulary.pieces)]
            answers[index] = vocabulary.pieces.decode(spoken).strip()
    return answers


def generate_batch(model: ChatGLM3, rows: list[list[int]], limit: int) -> list[list[int]]:
    """Greedy continuation of each row, without the end token, at most `limit` tokens."""
    width = max(map(len, rows))
    pads = torch.tensor([width - len(row) for row in rows])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    columns = torch.arange(width)
    visible = columns[None, :] >= pads[:, None]
    mask = (visible[:, None, :] & (columns[None, :, None] >= columns[None, None, :]))[:, None]
    mask = mask | torch.eye(width, dtype=torch.bool)  # a padding row needs something to attend to
    positions = (columns[None, :] - pads[:, None]).clamp(min=0)
    caches = [[] for _ in range(model.size.num_layers)]
    taken: list[list[int]] = [[] for _ in rows]
    done = torch.zeros(len(rows), dtype=torch.bool)
    for _ in range(limit):
        blocked = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        tokens = model.logits(model.hidden(ids, caches, positions, blocked)[:, -1]).argmax(-1)
        done |= tokens == EOS
        if done.all():
            break
        for row, token in enumerate(tokens.tolist()):
            if not done[row]:
                taken[row].append(token)
        visible = torch.cat([visible, torch.ones(len(rows), 1, dtype=torch.bool)], 1)
        ids, positions, mask = tokens[:, None], positions[:, -1:] + 1, visible[:, None, None, :]
    return taken


def recitals(model: ChatGLM3, vocabulary: ChatVocabulary, poems: list[Poem]) -> tuple[int, int, list[Poem]]:
    """(recited from title and author alone, recited in all, the poems that failed).

    The second figure adds the poems whose title and author also name an earlier poem, asked for with their opening.
    """
    prompts = canonical_prompts(poems)
    answers = generate(model, vocabulary, prompts, [len(poem.text) for poem in poems])
    right = [answer == poem.text for answer, poem in zip(answers, poems, strict=True)]
    named = [prompt == name_prompt(poem) for prompt, poem in zip(prompts, poems, strict=True)]
    failed = [poem for poem, good in zip(poems, right, strict=True) if not good]
    return sum(a and b for a, b in zip(right, named, strict=True)), sum(right), failed


@torch.no_grad()
def quantized_copy(model: ChatGLM3, bits: int, group: int | None = None) -> ChatGLM3:
    """The model with its matrices rounded to symmetric integers, one scale a row, or a group of columns of it."""
    copy = ChatGLM3(model.size)
    copy.load_state_dict(model.state_dict())
    for parameter in copy.parameters():
        if parameter.dim() == 2:
            blocks = parameter.view(parameter.shape[0], -1, group or parameter.shape[1])
            scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            parameter.copy_(((blocks / scale).round() * scale).view_as(parameter))
    return copy.eval()
