"""Poems and the ways in which people ask for them."""

import json
import lzma
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CANONICAL = "请背诵{author}的《{title}》。"
CANONICAL_WITH_OPENING = "请背诵{author}的《{title}》，首句“{opening}”。"

BY_TITLE_AND_AUTHOR = (
    "请背诵{author}的《{title}》",
    "背诵{author}《{title}》",
    "背诵{author}的《{title}》",
    "请背诵{author}《{title}》",
    "{author}的《{title}》",
    "{author}《{title}》",
    "《{title}》 {author}",
    "《{title}》{author}",
    "《{title}》（{author}）",
    "{author} {title}",
    "{title} {author}",
    "{author}的{title}",
    "请背诵{author}的{title}",
    "请写出{author}的《{title}》全文",
    "请写出{author}的《{title}》",
    "请默写{author}的《{title}》",
    "默写{author}的《{title}》",
    "背一下{author}的《{title}》",
    "请背一遍{author}的《{title}》",
    "请朗诵{author}的《{title}》",
    "我想听{author}的《{title}》",
    "请背诵唐诗《{title}》，作者{author}",
    "请背诵《{title}》，作者是{author}",
    "{author}的《{title}》怎么背？",
    "你会背{author}的《{title}》吗？",
)
BY_TITLE = (
    "请背诵《{title}》",
    "背诵《{title}》",
    "《{title}》",
    "{title}",
    "请写出《{title}》全文",
    "请默写《{title}》",
    "背一下《{title}》",
    "你会背《{title}》吗？",
)
WHOLE_BY_OPENING = (
    "请背诵首句是“{opening}”的诗",
    "请背诵以“{opening}”开头的诗",
    "“{opening}”是哪首诗的首句？请背诵全诗",
)
CONTINUE = ("{given}",) * 4 + (
    "请接着背：{given}",
    "接着背“{given}”",
    "请接下去：{given}",
    "“{given}”的后面是什么？",
    "{given}……",
)

# Other names under which a poem of the anthology is known, by the (title, author) that it has in the file.
ALIASES = {
    ("夜思", "李白"): [("静夜思", "李白")],
    ("草", "白居易"): [("赋得古原草送别", "白居易"), ("古原草", "白居易")],
    ("渭城曲", "王维"): [("送元二使安西", "王维")],
    ("近试上张水部", "朱庆余"): [("近试上张籍水部", "朱庆余"), ("闺意献张水部", "朱庆余")],
    ("送孟浩然之广陵", "李白"): [("黄鹤楼送孟浩然之广陵", "李白")],
    ("早发白帝城", "李白"): [("下江陵", "李白"), ("朝发白帝城", "李白")],
    ("出塞", "王之涣"): [("凉州词", "王之涣")],
    ("列女操", "孟郊"): [("烈女操", "孟郊")],
    ("破山寺后禅院", "常建"): [("题破山寺后禅院", "常建")],
    ("登乐游原", "李商隐"): [("乐游原", "李商隐")],
    ("秋夜寄邱员外", "韦应物"): [("秋夜寄丘员外", "韦应物"), ("秋夜寄丘二十二员外", "韦应物")],
    ("送灵澈", "刘长卿"): [("送灵澈上人", "刘长卿")],
    ("临洞庭上张丞相", "孟浩然"): [("望洞庭湖赠张丞相", "孟浩然")],
    ("送杜少府之任蜀州", "王勃"): [("送杜少府之任蜀川", "王勃")],
    ("渡汉江", "李频"): [("渡汉江", "宋之问")],
    ("经邹鲁祭孔子而叹之", "唐玄宗"): [("经邹鲁祭孔子而叹之", "李隆基")],
    ("寻陆鸿渐不遇", "僧皎然"): [("寻陆鸿渐不遇", "皎然")],
    ("寻西山隐者不遇", "邱为"): [("寻西山隐者不遇", "丘为")],
    ("送李端", "卢伦"): [("送李端", "卢纶")],
    ("没蕃故人", "张藉"): [("没蕃故人", "张籍")],
    ("阙题", "刘脊虚"): [("阙题", "刘昚虚")],
    ("古意呈补阙乔知之", "沈全期"): [("古意呈补阙乔知之", "沈佺期")],
    ("寒食", "韩翎"): [("寒食", "韩翃")],
    ("已凉", "韩翎"): [("已凉", "韩偓")],
    ("长信怨", "王昌龄"): [("长信秋词", "王昌龄")],
}

STOPS = "，。！？；："
SENTENCE_ENDS = "。！？"
CLEAN_TEXT = re.compile(r"[\u4e00-\u9fff，。！？、；：《》“”]+")


@dataclass(frozen=True)
class Poem:
    title: str
    author: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        return self.title, self.author

    @property
    def opening(self) -> str:
        """The first phrase without its punctuation mark; one shorter than 4 characters takes the next along."""
        for index, char in enumerate(self.text):
            if char in STOPS and index >= 4:
                return self.text[:index]
        return self.text

    def sentences(self) -> list[int]:
        """Start offsets of the sentences in the text."""
        ends = [index + 1 for index, char in enumerate(self.text) if char in SENTENCE_ENDS]
        return [0, *(end for end in ends if end < len(self.text))]


def read_jsonl(path: Path) -> list[dict]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def read_poems(path: Path) -> list[Poem]:
    """Poems of a .jsonl or .jsonl.xz file with `title`, `author` and `lines` or `text`."""

    def text(row: dict) -> str:
        return row["text"] if "text" in row else "".join(row["lines"])

    return [Poem(row["title"].strip(), row["author"].strip(), text(row).strip()) for row in read_jsonl(path)]


def training_poems(poems: list[Poem], anthology: list[Poem]) -> list[Poem]:
    """Poems that are plain verse and give no second answer to a question about the anthology.

    The large collection has other versions of anthology poems: those with the same title and author, or the
    same opening, are left out.
    """
    keys = {(bare(title), author) for poem in anthology for title, author in names(poem)}
    openings = {poem.opening for poem in anthology}

    def clashes(poem: Poem) -> bool:
        return (bare(poem.title), poem.author) in keys or poem.opening in openings

    return [poem for poem in poems if CLEAN_TEXT.fullmatch(poem.text) and not clashes(poem)]


def bare(title: str) -> str:
    return re.sub(r"[^\u4e00-\u9fff]", "", title)


def names(poem: Poem) -> list[tuple[str, str]]:
    """Every (title, author) by which the poem may be asked for, its own first."""
    found = [poem.key, *ALIASES.get(poem.key, [])]
    if poem.title.endswith("・并序"):
        found.append((poem.title.removesuffix("・并序"), poem.author))
    return found


def vary_title(title: str, rng: random.Random) -> str:
    """The middle dot and ASCII commas as people may type them."""
    if "・" in title and rng.random() < 0.5:
        title = title.replace("・", rng.choice(["·", "•", " ", ""]))
    if "," in title and rng.random() < 0.5:
        title = title.replace(",", "，").replace(".", "。")
    return title


def end_variant(prompt: str, rng: random.Random) -> str:
    return prompt if prompt[-1] in "？…" else prompt + rng.choice(["", "", "。"])


def with_opening(poem: Poem) -> str:
    return CANONICAL_WITH_OPENING.format(title=poem.title, author=poem.author, opening=poem.opening)


class Asker:
    """Draws (prompt, answer) pairs for the poems of one collection.

    `unique_titles` name a poem without the author. `first` holds the poem that a title and author name: of several
    with the same ones it is the first in the file, and the others are asked for with their opening.
    """

    def __init__(self, poems: list[Poem], title_alone: bool):
        self.first: dict[tuple[str, str], Poem] = {}
        for poem in poems:
            self.first.setdefault(poem.key, poem)
        titles = Counter(title for poem in poems for title in {title for title, _ in names(poem)})
        self.unique_titles = {title for title, count in titles.items() if count == 1} if title_alone else set()

    def ask(self, poem: Poem, rng: random.Random) -> tuple[str, str]:
        """A prompt for the poem in one of the forms above, and the answer to it."""
        kind = rng.random()
        if kind < 0.58 and self.first[poem.key] == poem:
            return self.by_title(poem, rng), poem.text
        if kind < 0.68 or (self.first[poem.key] != poem and kind < 0.8):
            if rng.random() < 0.6:
                return with_opening(poem), poem.text
            return end_variant(rng.choice(WHOLE_BY_OPENING).format(opening=poem.opening), rng), poem.text
        return continuation(poem, 0 if kind < 0.92 else rng.choice(poem.sentences()), rng)

    def by_title(self, poem: Poem, rng: random.Random) -> str:
        if rng.random() < 0.45:
            return CANONICAL.format(title=poem.title, author=poem.author)
        title, author = rng.choice(names(poem))
        alone = title in self.unique_titles and rng.random() < 0.15
        form = rng.choice(BY_TITLE if alone else BY_TITLE_AND_AUTHOR)
        return end_variant(form.format(title=vary_title(title, rng), author=author), rng)


def continuation(poem: Poem, start: int, rng: random.Random) -> tuple[str, str]:
    """The phrase or sentence at offset `start` as prompt, and what follows it as answer."""
    rest = poem.text[start:]
    phrase = Poem("", "", rest).opening
    sentence = rest[: next((i + 1 for i, c in enumerate(rest) if c in SENTENCE_ENDS), len(rest))]
    given = sentence if len(sentence) < len(rest) and rng.random() < 0.25 else phrase
    answer = rest[len(given) :].lstrip(STOPS)
    if not answer:
        return with_opening(poem), poem.text
    mark = rest[len(given)] if given == phrase and rng.random() < 0.4 else ""
    return rng.choice(CONTINUE).format(given=given + mark), answer
