"""Every page starts with a command, every command and program on it runs, and the Chinese pages match the English.

`chatglm3-6b` on the pages is the demo checkpoint here: a real one of that architecture, only smaller. The names of
other presets are checkpoints of their architectures with random weights, smaller still. `chatglm3-6b-lora` is an
adapter for the first, `chatglm3-6b-ptuning` a trained prefix, `poems.jsonl` holds the json block of its page.
`chatglm3-6b-ov` is what the README makes, unless the page makes it. A calibration is of fewer tokens than usual: it
would be most of the time here.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_files import low_rank, write_lora
from page_checkpoints import write_page_checkpoint
from safetensors.torch import save_file

from chatglm_ov.cli import demo
from chatglm_ov.cli.main import build_parser, main
from chatglm_ov.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/models/*.md")])
ENGLISH = [page for page in PAGES if not page.name.endswith(".zh.md")]
MODELS = [page for page in PAGES if page.parent.name == "models"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LETTERED = re.compile(r"(?:[A-Z] +)?(?:[A-Z_]+=\S+ )*chatglm-ov (\w+ .*)")
"""A command as the pages have it in text blocks, with a letter that it is called by or without."""
CHECKPOINT = ROOT / "chatglm_ov" / "demo" / "checkpoint"
HIDDEN, LAYERS, KEY_VALUE_FEATURES = 256, 5, 128
FEW_TOKENS = "1024"


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def lines(text: str) -> list[str]:
    """Those of a block, each that goes on in the next one joined with it."""
    return text.replace("\\\n", " ").splitlines()


def new_output(line: str) -> str | None:
    """The folder that must not be there before this command, or None."""
    command = re.search(r"(?:chatglm-ov convert|tools/gen_chatglm\.py) \S+ (\S+)", line)
    return command[1] if command and not re.search(r" --(?:add|overwrite)\b", line) else None


def headings(page: Path) -> list[int]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [len(match[1]) for match in re.finditer(r"^(#+) ", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint in the two usual formats."""
    output = tmp_path_factory.mktemp("docs") / "chatglm3-6b-ov"
    assert main(["convert", str(CHECKPOINT), str(output)]) == 0
    return output


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    environment = {}
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if not words:
        return
    if words[0] == "chatglm-ov":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            calibrated = {"--awq", "--gptq"} & set(words)
            assert main([*words[1:], *(("--calibration-tokens", FEW_TOKENS) if calibrated else ())]) == 0, line
    elif words[0] == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *words[1:]], check=True, capture_output=True)
    elif words[0] == "python" and words[1].startswith("tools/"):
        command = [sys.executable, str(ROOT / words[1]), *words[2:]]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    else:
        assert words[0] in {"git", "cd", "pip"}, f"a command that this test does not know: {line}"


@pytest.mark.parametrize("page", ENGLISH, ids=page_id)
def test_commands_and_programs_run(
    page: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the Chinese pages are the same: `test_chinese_page_has_the_same_structure`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", int(FEW_TOKENS))
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    shutil.copytree(CHECKPOINT, "chatglm3-6b")
    write_lora(
        Path("chatglm3-6b-lora"), low_rank("transformer.encoder.layers.0.self_attention.dense", (HIDDEN, HIDDEN))
    )
    Path("chatglm3-6b-ptuning").mkdir()
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 2 * LAYERS * KEY_VALUE_FEATURES)}
    save_file(prefix, "chatglm3-6b-ptuning/model.safetensors")
    found = blocks(page)
    commands = [line for kind, text in found if kind == "bash" for line in lines(text)]
    for name in {word for line in commands for word in line.split()} & set(PRESETS) - {"chatglm3-6b"}:
        write_page_checkpoint(name, Path(name))
    if "chatglm3-6b-ov" not in {new_output(line) for line in commands}:
        shutil.copytree(converted, "chatglm3-6b-ov")
    for kind, text in found:
        if kind == "bash":
            for line in lines(text):
                run_command(line)
        elif kind == "json":
            Path("poems.jsonl").write_text(text, encoding="utf-8")
        elif kind == "python":
            Path("program.py").write_text(text, encoding="utf-8")
            runpy.run_path("program.py", run_name="__main__")


def test_commands_that_would_take_long_are_understood() -> None:
    """Those in text blocks. Some pages have to have some: else a pattern that fits none would go unseen."""
    parser, understood = build_parser(), dict.fromkeys(ENGLISH, 0)
    for page in ENGLISH:
        for line in (line for kind, text in blocks(page) if kind == "text" for line in lines(text)):
            if command := LETTERED.match(line):
                assert parser.parse_args(shlex.split(command[1])).run, f"{page_id(page)}: {line}"
                understood[page] += 1
    assert all(understood[page] for page in MODELS if page in ENGLISH)
    assert understood[ROOT / "docs" / "performance.md"] >= 12
    assert understood[ROOT / "docs" / "accuracy.md"] >= 8


def test_no_two_pages_convert_to_the_same_folder() -> None:
    """So that a reader can follow them one after the other. Only the quickstart repeats a command of the README."""
    made: dict[str, set[str]] = {}
    for page in ENGLISH:
        for line in (line for _, text in blocks(page) for line in lines(text)):
            if output := new_output(line):
                made.setdefault(output, set()).add(page_id(page))
    assert len(made) >= 30
    assert made.pop("chatglm3-6b-ov") == {"README.md", "docs/quickstart.md"}
    assert {output: pages for output, pages in made.items() if len(pages) > 1} == {}


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ("chatglm-ov convert chatglm3-6b new --weight-format int8", "new"),
        ("chatglm-ov convert chatglm3-6b old --add", None),
        ("chatglm-ov convert chatglm3-6b old --weight-format int8 --overwrite", None),
        ("python tools/gen_chatglm.py chatglm3-6b new --weight-format bf16", "new"),
        ("CHATGLM_OV_ISA=avx2 chatglm-ov convert chatglm3-6b new", "new"),
        ("chatglm-ov chat old", None),
        ("# a comment", None),
    ],
)
def test_what_a_command_makes(line: str, output: str | None) -> None:
    assert new_output(line) == output


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_starts_with_a_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    second_heading = text.find("\n## ")
    assert blocks(page)[0][0] == "bash"
    assert 0 < text.find("```bash") < (second_heading if second_heading > 0 else len(text))


@pytest.mark.parametrize("page", ENGLISH, ids=page_id)
def test_chinese_page_has_the_same_structure(page: Path) -> None:
    chinese = page.with_name(page.name.replace(".md", ".zh.md"))
    assert chinese.exists()
    assert headings(chinese) == headings(page)
    assert [text for _, text in blocks(chinese)] == [text for _, text in blocks(page)]


def anchors(page: Path) -> set[str]:
    """What a link may have behind its #: headings as GitHub writes them, in small letters, without punctuation and with
    hyphens for spaces."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_anchors_are_those_of_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `rope_ratio`, NaN\n\n```bash\n# no heading\n```\n\n## 线程与 NUMA：两个\n", encoding="utf-8")
    assert anchors(page) == {"rope_ratio-nan", "线程与-numa两个"}


@pytest.mark.parametrize("suffix", [".md", ".zh.md"])
def test_model_pages_are_alike_and_found(suffix: str) -> None:
    """Each has the headings of the others, and is linked from both tables of models."""
    pages = [page for page in MODELS if page.name.endswith(".zh.md") == (suffix == ".zh.md")]
    titles = {tuple(re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in pages}
    assert len(titles) == 1
    for table, prefix in ((ROOT / f"README{suffix}", "docs/models/"), (ROOT / "docs" / f"models{suffix}", "models/")):
        links = re.findall(r"\]\(([^)]+)\)", table.read_text(encoding="utf-8"))
        assert {prefix + page.name for page in pages} <= set(links), table.name


def test_files_that_are_named_are_there() -> None:
    """Those of the package, its kernels and tools, and of the tests, which the tables of models name as proofs."""
    named: dict[Path, list[str]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named[page] = re.findall(r"`((?:chatglm_ov|tests|csrc|tools)/[\w/.-]*)`", text)
    assert [f"{page_id(page)}: {name}" for page in PAGES for name in named[page] if not (ROOT / name).exists()] == []
    assert all(named[page] for page in MODELS)
    assert all(len(named[ROOT / f"README{suffix}"]) >= 20 for suffix in (".md", ".zh.md"))


def test_pages_name_the_published_repositories() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in MODELS if not page.name.endswith(".zh.md"))
    for fields in PRESETS.values():
        assert f"`{fields['_name_or_path'].replace('THUDM/', 'zai-org/')}`" in text
