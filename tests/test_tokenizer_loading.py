"""Which tokenizer a folder gets, how its files are copied, and what broken ones say."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizer_cases import DATA, GOLDEN, fast_folder, small_folder, small_sentencepiece, tokenizer_of
from transformers import PreTrainedTokenizerFast

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.tokenizer import detect_family, load_tokenizer, save_tokenizer_files
from chatglm_ov.tokenizer.files import CONFIG_FILE

pytestmark = pytest.mark.transformers_matrix

SENTENCES = ["你好，世界", "床前明月光", "def f(x):\n    return x\t# 1", "<|user|> [MASK] <eop>", ""]


def bare_folder(folder, **files):
    """A folder with the small vocabulary; keyword `a__b=text or dict` writes the file a.b."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(small_sentencepiece())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "family"),
    [
        ({}, "chatglm3"),
        ({"tokenizer_config__json": {"name_or_path": "THUDM/chatglm2-6b-32k"}}, "chatglm2"),
        ({"tokenizer_config__json": {"name_or_path": "THUDM/chatglm3-6b"}}, "chatglm3"),
        ({"tokenizer_config__json": {"name_or_path": "THUDM/codegeex2-6b"}}, "chatglm2"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}}, "chatglm3"),
        ({"tokenizer_config__json": {"chat_template": "<|{{ messages[0].role }}|>\n<|assistant|>"}}, "chatglm3"),
        ({"tokenization_chatglm__py": 'special_tokens = ["[MASK]", "sop", "eop"]'}, "chatglm2"),
        ({"tokenization_chatglm__py": 'special_tokens = ["sop", "eop", "<|system|>"]\nraise SystemExit'}, "chatglm3"),
        ({"config__json": {"_name_or_path": "THUDM/chatglm2-6b", "transformers_version": "4.40.0"}}, "chatglm2"),
        ({"config__json": {"_name_or_path": "x", "transformers_version": "4.27.1"}}, "chatglm2"),
        ({"config__json": {"_name_or_path": "x", "transformers_version": "4.30.2"}}, "chatglm3"),
        ({"tokenizer_config__json": {"chatglm_ov_tokenizer": "chatglm2", "name_or_path": "chatglm3-6b"}}, "chatglm2"),
    ],
)
def test_chatglm2_or_chatglm3(tmp_path, files, family):
    folder = bare_folder(tmp_path / "checkpoint", **files)
    assert detect_family(folder) == family
    tokenizer = load_tokenizer(folder)
    assert tokenizer.family == family
    assert ("<|user|>" in tokenizer.get_vocab()) == (family == "chatglm3")


def test_family_keyword_overrides(tmp_path):
    folder = bare_folder(tmp_path, tokenizer_config__json={"chatglm_ov_tokenizer": "chatglm3"})
    assert load_tokenizer(folder, family="chatglm2").family == "chatglm2"
    with pytest.raises(ChatGLMError, match="family is 'glm5', expected chatglm or chatglm2 or chatglm3 or glm4"):
        load_tokenizer(folder, family="glm5")


def test_family_of_the_goldens():
    assert tokenizer_of("v1").family == "chatglm"
    assert tokenizer_of("glm4").family == "glm4"
    assert tokenizer_of("v2").family == "chatglm2"
    assert tokenizer_of("v3").family == "chatglm3"


def source_folder(tmp_path, kind):
    """A checkpoint's tokenizer files, with remote code beside them that must never be run nor copied."""
    folder = tmp_path / "checkpoint"
    if kind in ("chatglm2", "chatglm3"):
        small_folder(folder, kind)
    elif kind == "fast":
        fast_folder(folder)
    else:
        shutil.copytree(DATA / {"chatglm": "tokenizer_v1", "glm4": "tokenizer_glm4"}[kind], folder)
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit('run') # <|system|>")
    return folder


@pytest.mark.parametrize("kind", ["chatglm", "chatglm2", "chatglm3", "glm4", "fast"])
def test_saved_files_are_complete_by_themselves(tmp_path, kind):
    source, output = source_folder(tmp_path, kind), tmp_path / "converted"
    written = save_tokenizer_files(source, output)
    assert sorted(written) == sorted(output.iterdir())
    names = {path.name for path in written}
    assert "tokenizer_config.json" in names and not any(name.endswith(".py") for name in names)
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and config.get("chatglm_ov_tokenizer") == (None if kind == "fast" else kind)
    (output / "config.json").write_text('{"transformers_version": "4.27.1", "vocab_size": 150528}')
    before, after = load_tokenizer(source), load_tokenizer(output)
    assert type(before) is type(after)
    for text in SENTENCES:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)
    assert after.pad_token_id == before.pad_token_id and after.eos_token_id == before.eos_token_id


def test_saving_can_be_told_the_family(tmp_path):
    source = small_folder(tmp_path / "a", "chatglm3")
    save_tokenizer_files(source, tmp_path / "b", family="chatglm2")
    assert load_tokenizer(tmp_path / "b").family == "chatglm2"


def test_nothing_is_written_without_a_tokenizer(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    assert save_tokenizer_files(tmp_path / "a", tmp_path / "b") == []
    assert not (tmp_path / "b").exists()


def test_tokenizer_json_alone(tmp_path):
    tokenizer = load_tokenizer(fast_folder(tmp_path))
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.padding_side == "left"
    ids = tokenizer("床前明月光<|user|>")["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert tokenizer.decode(ids) == "床前明月光<|user|>"


# ---- errors: one line with place, field, what was seen and what was wanted


def message_of(folder, **kwargs) -> str:
    with pytest.raises(ChatGLMError) as error:
        load_tokenizer(folder, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_missing_files(tmp_path):
    wanted = "expected ice_text.model, tokenizer.model or tokenizer.json"
    assert message_of(tmp_path) == f"{tmp_path}: tokenizer file is missing, {wanted}"
    assert message_of(tmp_path / "no").endswith("no: folder is missing, expected a folder with a tokenizer")
    (tmp_path / "file").write_text("")
    assert "folder is a file" in message_of(tmp_path / "file")
    assert "folder is of type int" in message_of(7)
    folder = bare_folder(tmp_path)
    assert message_of(folder, family="chatglm").endswith("missing, expected the vocabulary of family chatglm")


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\xff"])
def test_broken_tokenizer_config(tmp_path, content):
    folder = bare_folder(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    assert "tokenizer_config.json: contents is" in message_of(folder)


def test_unknown_marker(tmp_path):
    folder = bare_folder(tmp_path, tokenizer_config__json={"chatglm_ov_tokenizer": "chatglm9"})
    assert "tokenizer_config.json: chatglm_ov_tokenizer is 'chatglm9'" in message_of(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100, b"\n\x05hello", b"not a rank file\nat all\n"])
@pytest.mark.parametrize("name", ["tokenizer.model", "ice_text.model"])
def test_garbage_sentencepiece_model(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    expected = f"{name}: content is not a whole sentencepiece model ({len(content)} bytes)"
    assert expected in message_of(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "ice_text.model"])
def test_truncated_sentencepiece_model_at_every_kind_of_place(tmp_path, name):
    whole = small_sentencepiece() if name == "tokenizer.model" else (DATA / "tokenizer_v1" / name).read_bytes()
    places = {1, 2, 3, len(whole) // 2, len(whole) - 1, len(whole) - 2, *range(0, 1500, 7)}
    for place in sorted(places):
        (tmp_path / name).write_bytes(whole[:place])
        assert "not a whole sentencepiece model" in message_of(tmp_path), place


@pytest.mark.parametrize("cut", [1, 10, 5000, 16000])
def test_truncated_ranks(tmp_path, cut):
    """Cut within a line, or at the end of one: the ids of the special tokens no longer fit."""
    shutil.copytree(DATA / "tokenizer_glm4", tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "tokenizer.model").read_bytes().rstrip(b"\n")
    (tmp_path / "tokenizer.model").write_bytes(whole[:-cut])
    assert "tokenizer.model: " in message_of(tmp_path, family="glm4")
    lines = whole.splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-3]))
    assert "number of tokens is 1497, expected 1500, the first id of added_tokens_decoder" in message_of(tmp_path)


@pytest.mark.parametrize("line", [b"IQ== zero", b"IQ==", b"!!! 0", b"IQ== 5", b"IQ== -1", b"", b"\xff\xfe 0"])
def test_garbage_ranks(tmp_path, line):
    shutil.copytree(DATA / "tokenizer_glm4", tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines[:700], line, *lines[701:]]))
    text = message_of(tmp_path)
    assert "line 701 is" in text and "expected `base64(bytes) 700`" in text


def test_ranks_that_are_double_or_lack_a_byte(tmp_path):
    shutil.copytree(DATA / "tokenizer_glm4", tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines[:9], lines[8].split()[0] + b" 9", *lines[10:]]))
    assert "1499 different ones, 255 of them single bytes, expected 1500, all 256 bytes among them" in message_of(
        tmp_path
    )


@pytest.mark.parametrize("content", ["", "{}", "garbage"])
def test_garbage_tokenizer_json(tmp_path, content):
    fast_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    assert "tokenizer.json: content is one that cannot be read" in message_of(tmp_path)


def test_number_of_image_tokens_that_is_none(tmp_path):
    shutil.copytree(DATA / "tokenizer_v1", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"num_image_tokens": "many"}')
    assert "tokenizer_config.json: num_image_tokens is 'many', expected a number, 0 or more" in message_of(tmp_path)


def test_importing_the_package_does_not_import_transformers():
    import subprocess
    import sys

    code = (
        "import chatglm_ov.tokenizer, chatglm_ov.chat, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_shared_goldens_were_there():
    """Says in the summary when the real vocabularies were not compared."""
    if not GOLDEN.is_dir():
        pytest.skip("../shared/golden is not here: the real vocabularies were not loaded")
    assert len(load_tokenizer(GOLDEN / "v3" / "tokenizer")) == 64798


def test_how_a_training_padded_does_not_matter(tmp_path):
    files = {"tokenizer_config__json": {"padding_side": "right", "vocab_file": "elsewhere", "auto_map": {}}}
    folder = bare_folder(tmp_path / "checkpoint", **files)
    assert load_tokenizer(folder).padding_side == "left"
    save_tokenizer_files(folder, tmp_path / "out")
    assert not files["tokenizer_config__json"].keys() & json.loads((tmp_path / "out" / CONFIG_FILE).read_text()).keys()
    with pytest.raises(ChatGLMError, match="padding_side is 'right', expected 'left'"):
        load_tokenizer(folder, padding_side="right")


@pytest.mark.parametrize("fields", [{"truncation_side": "x"}, {"additional_special_tokens": 5}])
def test_tokenizer_fields_that_cannot_be(tmp_path, fields):
    folder = bare_folder(tmp_path / "checkpoint", tokenizer_config__json=fields)
    with pytest.raises(ChatGLMError, match=r"tokenizer_config\.json: fields is unusable"):
        load_tokenizer(folder)
