"""The demo model's training: what is asked, how it is spelled in ids, and the PyTorch model that learns it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from demo import corpus, evaluation  # noqa: E402
from demo.batches import BATCH_TOKENS, ConversationStream, pad_rows  # noqa: E402
from demo.export import read_checkpoint, write_checkpoint  # noqa: E402
from demo.model import ChatGLM3, Size  # noqa: E402
from demo.training import OPENING_TOKENS, OPENING_WEIGHT, Plan, Trainer, answer_loss, token_weights  # noqa: E402
from demo.vocabulary import EOS, IGNORED, SPECIALS, ChatVocabulary, train_vocabulary  # noqa: E402

DEMO = ROOT / "chatglm_ov" / "demo"
GOLDEN = ROOT / "tests" / "data" / "golden" / "v2" / "v2_tiny"
POEMS = [
    corpus.Poem("夜思", "李白", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
    corpus.Poem("送别", "王维", "下马饮君酒，问君何所之。君言不得意，归卧南山陲。但去莫复问，白云无尽时。"),
    corpus.Poem("送别", "王维", "山中相送罢，日暮掩柴扉。春草明年绿，王孙归不归？"),
    corpus.Poem("长相思・其一", "李白", "长相思，在长安。络纬秋啼金井阑，微霜凄凄簟色寒。"),
    corpus.Poem("相思", "王维", "红豆生南国，春来发几枝。愿君多采撷，此物最相思。"),
]
TINY = Size(32, 2, 4, 2, 8, 48, seq_length=256, padded_vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    texts = [text for poem in POEMS for text in (poem.title, poem.author, poem.text, corpus.CANONICAL)]
    return train_vocabulary(texts, {char for text in texts for char in text} - {" "}, size=390)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: bytes) -> ChatVocabulary:
    return ChatVocabulary(tokenizer)


@pytest.fixture(scope="module")
def anthology(shared: Path) -> list[corpus.Poem]:
    return corpus.read_poems(shared / "data" / "tang300.jsonl")


def golden_model() -> ChatGLM3:
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    model = ChatGLM3(Size(**{name: config[name] for name in Size.__dataclass_fields__}))
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted((GOLDEN / "checkpoint").glob("*.bin")):
        weights |= torch.load(shard, weights_only=True)
    weights.pop("transformer.rotary_pos_emb.inv_freq")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def stream(vocabulary: ChatVocabulary, seed: int = 3) -> ConversationStream:
    return ConversationStream(POEMS[:3], POEMS[3:], vocabulary, seq_length=256, seed=seed)


def test_the_training_model_is_the_original_architecture() -> None:
    golden, model = np.load(GOLDEN / "golden.npz"), golden_model()
    prompts = [key.removesuffix("_prefill_logits") for key in golden if key.endswith("_prefill_logits")]
    assert prompts
    for prompt in prompts:
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.from_numpy(golden[f"{prompt}_input_ids"])))
        np.testing.assert_allclose(logits.numpy(), golden[f"{prompt}_prefill_logits"], atol=1e-3, rtol=0)


def test_cached_generation_of_a_padded_batch_is_the_original() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    pads, ids = golden["batch_pads"].tolist(), golden["batch_input_ids"].tolist()
    with torch.no_grad():
        taken = evaluation.generate_batch(golden_model(), [row[pad:] for row, pad in zip(ids, pads, strict=True)], 24)
    for tokens, expected in zip(taken, golden["batch_generate"].tolist(), strict=True):
        assert tokens == (expected[: expected.index(EOS)] if EOS in expected else expected)


def test_prompt_ids_are_those_of_chatglm3(shared: Path) -> None:
    real = ChatVocabulary(shared / "golden" / "v3" / "tokenizer" / "tokenizer.model")
    assert len(real) == 64798
    assert real.prompt("你好") == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]


def test_vocabulary_has_the_layout_of_chatglm3(vocabulary: ChatVocabulary) -> None:
    pieces = vocabulary.pieces
    assert [pieces.id_to_piece(i) for i in (0, 1, 2, 3, 13, 258)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0x0A>",
        "<0xFF>",
    ]
    assert [vocabulary.special[token] for token in SPECIALS] == list(range(390, 399))
    for text in (*(poem.text for poem in POEMS), "ＡＢ  ①\n龘 a  b", " 前后 "):
        assert pieces.decode(pieces.encode(text)) == text


def test_labels_are_the_next_ids_and_every_answer_ends(vocabulary: ChatVocabulary) -> None:
    turns = [("背诵夜思", POEMS[0].text), ("山中相送罢", "日暮掩柴扉。")]
    ids, labels = vocabulary.conversation(turns)
    ends = [i for i, label in enumerate(labels) if label == EOS]
    learned = [i for i, label in enumerate(labels) if label not in (IGNORED, EOS)]
    assert ends[-1] == len(ids) - 1 and ids[ends[0] + 1] == vocabulary.special["<|user|>"]
    assert all(labels[i] == ids[i + 1] for i in learned)
    said = [labels[i] for i in learned]
    assert said == vocabulary.answer(turns[0][1]) + vocabulary.answer(turns[1][1])


def test_every_way_of_asking_gives_the_poem_or_its_rest() -> None:
    rng, asker = random.Random(0), corpus.Asker(POEMS, title_alone=True)
    for _ in range(3000):
        poem = rng.choice(POEMS)
        prompt, answer = asker.ask(poem, rng)
        assert answer and poem.text.endswith(answer)
        if answer != poem.text:
            given = poem.text[: -len(answer)].rstrip(corpus.STOPS)
            assert given[-4:] in prompt
        elif poem is POEMS[2]:
            assert poem.opening in prompt, "its title and author name the other 送别"


def test_openings_and_names(anthology: list[corpus.Poem]) -> None:
    assert POEMS[3].opening == "长相思，在长安"
    assert ("静夜思", "李白") in corpus.names(POEMS[0])
    keys = {poem.key for poem in anthology}
    assert set(corpus.ALIASES) <= keys
    assert len({poem.opening for poem in anthology}) == len(anthology) == 313
    aliases = [name for poem in anthology for name in corpus.names(poem)[1:]]
    assert len(set(aliases)) == len(aliases) and keys.isdisjoint(aliases)


def test_training_poems_do_not_contradict_the_anthology(shared: Path, anthology: list[corpus.Poem]) -> None:
    everything = corpus.read_poems(shared / "data" / "tang_poems_train.jsonl.xz")
    kept = corpus.training_poems(everything, anthology)
    assert 45_000 < len(kept) < len(everything) == 49_435
    assert {p.opening for p in kept}.isdisjoint(p.opening for p in anthology)
    assert {p.key for p in kept}.isdisjoint(name for p in anthology for name in corpus.names(p))
    held_out = {p.text for p in corpus.read_poems(shared / "data" / "tang_poems_test.jsonl.xz")}
    assert held_out.isdisjoint(p.text for p in kept)


def test_data_order_is_reproducible_and_continues_from_its_state(vocabulary: ChatVocabulary) -> None:
    first, second = stream(vocabulary), stream(vocabulary)
    for step in range(90):
        ids, labels = first.next(step)
        assert ids.shape == labels.shape and ids.numel() <= BATCH_TOKENS
        assert torch.equal(ids, second.next(step)[0])
    resumed = stream(vocabulary, seed=99)
    resumed.load_state(first.state())
    for _ in range(70):
        assert torch.equal(resumed.next(2000)[0], second.next(2000)[0])


def test_a_continued_run_gives_the_weights_of_an_unbroken_one(tmp_path: Path, vocabulary: ChatVocabulary) -> None:
    plan = Plan("tiny", steps=4, seed=0, threads=1, learning_rate=1e-3, bf16=False)

    def trainer(folder: str) -> Trainer:
        torch.manual_seed(0)
        return Trainer(ChatGLM3(TINY), stream(vocabulary), plan, tmp_path / folder / "snapshot.pt")

    def check(model: ChatGLM3) -> tuple[int, float]:
        return 0, 1.0

    unbroken, broken = trainer("a"), trainer("b")
    unbroken.run(check)
    losses = [broken.train_step(), broken.train_step()]
    broken.history.losses += losses
    broken.save()
    continued = trainer("b")
    continued.run(check)
    assert continued.history.losses == unbroken.history.losses
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name


def test_a_snapshot_of_another_plan_is_refused(tmp_path: Path, vocabulary: ChatVocabulary) -> None:
    def trainer(steps: int) -> Trainer:
        plan = Plan("tiny", steps, seed=0, threads=1, learning_rate=1e-3, bf16=False)
        return Trainer(ChatGLM3(TINY), stream(vocabulary), plan, tmp_path / "snapshot.pt")

    run = trainer(10)
    run.step = 7
    run.save()
    longer = trainer(20)
    longer.resume()
    assert longer.step == 7
    with pytest.raises(SystemExit, match="plan is"):
        trainer(8).resume()


def test_checkpoint_folder_round_trip(tmp_path: Path, tokenizer: bytes, vocabulary: ChatVocabulary) -> None:
    torch.manual_seed(1)
    model = ChatGLM3(TINY)
    write_checkpoint(tmp_path, model, tokenizer)
    again = read_checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.half().float(), again.state_dict()[name])
    ids, labels = pad_rows([vocabulary.conversation([("背诵夜思", POEMS[0].text)])])
    with torch.no_grad():
        assert abs(answer_loss(model, ids, labels) - answer_loss(again, ids, labels)) < 1e-2
    names = set(load_file(tmp_path / "model.safetensors"))
    assert len(names) == 4 + 7 * TINY.num_layers and "transformer.rotary_pos_emb.inv_freq" in names


def test_openings_of_answers_weigh_more(vocabulary: ChatVocabulary) -> None:
    turns = [("背诵夜思", POEMS[0].text), ("春草明年绿", "王孙归不归？")]
    _, labels = pad_rows([vocabulary.conversation(turns), vocabulary.conversation(turns[:1])])
    weights = token_weights(labels)
    assert torch.equal(weights == 0, labels == IGNORED)
    for turn, row in ((0, 0), (1, 0), (0, 1)):
        learned = (labels[row] != IGNORED).tolist()
        starts = [i for i, here in enumerate(learned) if here and not learned[i - 1]]
        length = len(vocabulary.answer(turns[turn][1])) + 1
        opening = min(length, OPENING_TOKENS)
        expected = [OPENING_WEIGHT] * opening + [1.0] * (length - opening)
        assert weights[row, starts[turn] : starts[turn] + length].tolist() == expected


def test_the_shipped_model_recites_the_anthology_as_its_card_says(anthology: list[corpus.Poem]) -> None:
    vocabulary, model = ChatVocabulary(DEMO / "checkpoint" / "tokenizer.model"), read_checkpoint(DEMO / "checkpoint")
    used = {char for poem in anthology for char in poem.title + poem.author + poem.text if not char.isspace()}
    assert all(not vocabulary.pieces.is_unknown(vocabulary.pieces.piece_to_id(char)) for char in used)
    for page in ("README.md", "README.zh.md"):
        assert all(str(figure) in (DEMO / page).read_text(encoding="utf-8") for figure in (308, 313))
    assert evaluation.forced_recitals(model, vocabulary, anthology) == len(anthology) == 313


def test_the_shipped_model_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 12_000_000
    model = read_checkpoint(DEMO / "checkpoint")
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_805_312
