"""`chatglm-ov generate`: the original's answers, streamed or not, and what it refuses."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import DATA, PROGRAM, Run, checkpoint, converted, finish, make_checkpoint, run, spawn  # noqa: F401
from page_checkpoints import write_page_checkpoint
from safetensors.torch import load_file, save_file
from transformers import set_seed

from chatglm_ov import OVChatGLMForCausalLM, convert, load_tokenizer
from chatglm_ov.cli import answer
from chatglm_ov.cli.answer import as_text, complete
from chatglm_ov.presets import config_json
from chatglm_ov.runtime.loading import load_model

EXACT = ("--weight-format", "f32", "--inference-precision", "f32")
STATS = re.compile(
    r"^\[(\d+) tokens, first token [\d.]+ ms(, next tokens [\d.]+ ms each)?, [\d.]+ tokens/s\]$", re.MULTILINE
)


@pytest.fixture(scope="module")
def chats() -> list[dict[str, Any]]:
    """What the original answered to whole conversations."""
    return json.loads((DATA / "golden" / "glm4" / "glm4_chat" / "chat.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(converted: Path) -> OVChatGLMForCausalLM:
    return OVChatGLMForCausalLM.from_pretrained(converted, "f32", "f32")


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_answers_as_the_original(converted: Path, run: Run, chats: list, options: list[str]) -> None:
    [asked] = chats[0]["messages"]
    done = run("generate", converted, "--prompt", asked["content"], "--max-new-tokens", 24, *EXACT, *options)
    assert done.code == 0
    assert done.out == chats[0]["decode_generated"] + "\n"
    assert STATS.match(done.err)[1] == "24"
    assert done.err.splitlines()[1:] == ["[cut after 24 tokens: --max-new-tokens allows more]"]


def test_raw_prompts_one_by_one(converted: Path, run: Run, model: OVChatGLMForCausalLM) -> None:
    prompts = ["床前明月光", "Write a function."]
    done = run("generate", converted, "--prompt", *prompts, "--raw", "--max-new-tokens", 16, *EXACT)
    tokenizer = load_tokenizer(converted)
    expected = []
    for prompt in prompts:
        inputs = tokenizer([prompt], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert done.out == "".join(text + "\n" for text in expected)
    assert len([line for line in done.err.splitlines() if STATS.match(line)]) == 2


def test_beams(converted: Path, run: Run, model: OVChatGLMForCausalLM) -> None:
    arguments = ("--prompt", "你好", "--max-new-tokens", 12, "--num-beams", 3, "--repetition-penalty", 1.3)
    done = run("generate", converted, *arguments, *EXACT)
    options = {"do_sample": False, "max_new_tokens": 12, "num_beams": 3, "repetition_penalty": 1.3}
    response, _ = model.chat(load_tokenizer(converted), "你好", history=[], **options)
    assert done.out.strip() == (response if isinstance(response, str) else "\n".join(response.values())).strip()


def test_no_token_twice(converted: Path, run: Run, model: OVChatGLMForCausalLM) -> None:
    asked = ("generate", converted, "--prompt", "你好", "--max-new-tokens", 40, *EXACT)
    options = {"do_sample": False, "max_new_tokens": 40, "no_repeat_ngram_size": 1}
    response, history = model.chat(load_tokenizer(converted), "你好", history=[], **options)
    done = run(*asked, "--no-repeat-ngram-size", 1)
    assert done.out == as_text(response, history) + "\n" != run(*asked).out


def test_a_seed_makes_sampling_repeatable(converted: Path, run: Run, model: OVChatGLMForCausalLM) -> None:
    drawing = ("--raw", "--prompt", "你好", "--max-new-tokens", 16, "--do-sample", "--temperature", 1.5, *EXACT)
    texts = [run("generate", converted, *drawing, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    tokenizer = load_tokenizer(converted)
    inputs = tokenizer(["你好"], return_tensors="pt")
    set_seed(1)
    ids = model.generate(**inputs, do_sample=True, temperature=1.5, max_new_tokens=16)
    assert texts[0] == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) + "\n"


def test_top_k_of_one_is_greedy(converted: Path, run: Run) -> None:
    asked = ("generate", converted, "--prompt", "你好", "--max-new-tokens", 12, *EXACT)
    assert run(*asked, "--do-sample", "--top-k", 1).out == run(*asked).out


def test_a_temperature_of_zero_is_greedy(converted: Path, run: Run) -> None:
    asked = ("generate", converted, "--prompt", "你好", "--max-new-tokens", 12, *EXACT)
    greedy = run(*asked).out
    for options in ([], ["--do-sample"], ["--do-sample", "--top-p", 0.5, "--seed", 3]):
        done = run(*asked, "--temperature", 0, *options)
        assert (done.code, done.out) == (0, greedy)


def test_a_system_text_begins_the_conversation(converted: Path, run: Run, model: OVChatGLMForCausalLM) -> None:
    asked = ("generate", converted, "--prompt", "你好", "再见", "--max-new-tokens", 12, *EXACT)
    expected = ""
    for query in ("你好", "再见"):
        history = [{"role": "system", "content": "You are a poet."}]
        options = {"do_sample": False, "max_new_tokens": 12}
        response, history = model.chat(load_tokenizer(converted), query, history=history, **options)
        expected += as_text(response, history) + "\n"
    assert run(*asked, "--system", "You are a poet.").out == expected != run(*asked).out


def test_prompts_from_files_and_the_standard_input(
    converted: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that ends a file is no part of its prompt, nor is a mark of its encoding; all else is."""
    asked = ("generate", converted, "--max-new-tokens", 8, "--raw", *EXACT)
    texts = ["床前明月光\n疑是", "Write a function.", "\n你好\n"]
    expected = run(*asked, "--prompt", *texts).out
    for name, text in zip(("a", "b"), ("\ufeff" + texts[1], texts[2] + "\n"), strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(texts[0] + "\n"))
    files = [tmp_path / name for name in ("a", "b")]
    assert run(*asked, "--prompt-file", *files, "--prompt", "-").out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run(*asked, "--prompt", "-").error == "standard input: text is empty, expected at least one character"
    (tmp_path / "a").write_bytes(b"\xff")
    assert run(*asked, "--prompt-file", files[0]).error.startswith(f"{files[0]}: encoding is not UTF-8")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_threads(command: str, converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model, and of one that guesses for it."""
    opened = []
    open_model = answer.open_model

    def opening(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        opened.append(open_model(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(answer, "open_model", opening)
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    prompt = ("--prompt", "你好", "--max-new-tokens", 4) if command == "generate" else ()
    assert run(command, converted, *prompt, "--threads", 1, "--assistant", converted).code == 0
    assert [each.compiled.compiled.get_property("INFERENCE_NUM_THREADS") for each, _ in opened] == [1, 1]


def test_weights_without_integers_leave_nothing_for_bits_of_activations(
    converted: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    if load_model(converted, "bf16").ops == "stock":
        pytest.skip("activation bits are those of fused operations")
    asked = ("generate", converted, "--prompt", "你好", "--max-new-tokens", 4, "--activation-bits", 8)
    for weight_format, told in (("bf16", ["--activation-bits 8 changes nothing for weights in bf16"]), ("int8", [])):
        caplog.clear()
        assert run(*asked, "--weight-format", weight_format).code == 0
        assert caplog.messages == told


def test_a_model_that_thinks_has_room_for_it(tmp_path: Path, run: Run) -> None:
    """More than 512 tokens, and no more than there are positions: one whose end never is the likeliest token."""
    write_page_checkpoint("glm-z1-9b-0414", tmp_path / "z1")
    config = tmp_path / "z1" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 700}))
    (file,) = (tmp_path / "z1").glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"][400:] = 0
    save_file(tensors, file)
    convert(tmp_path / "z1", tmp_path / "z1-ov", ["bf16"], progress=False)
    done = run("generate", tmp_path / "z1-ov", "--prompt", "你好")
    assert int(STATS.match(done.err)[1]) > 512
    assert done.err.splitlines()[1:] == ["[cut: the model has 700 positions]"]


def test_default_length_ends_with_the_positions(tmp_path: Path, run: Run) -> None:
    """A model with 32 positions: 512 tokens are the default where there is room, and no error here."""
    short = tiny(tmp_path, seq_length=32)
    for raw in ([], ["--raw"]):
        done = run("generate", short, "--prompt", "你好", *raw)
        assert done.code == 0, done.err
        assert 20 < int(STATS.match(done.err)[1]) < 32


@pytest.mark.parametrize("options", [[], ["--no-stream"], ["--raw"]])
def test_stop_texts_end_an_answer_and_are_not_in_it(converted: Path, run: Run, options: list[str]) -> None:
    arguments = ("generate", converted, "--prompt", "床前明月光", "--max-new-tokens", 24, *EXACT, *options)
    whole = run(*arguments).out.rstrip("\n")
    stop = whole[len(whole) // 2 :][:3]
    done = run(*arguments, "--stop", "not in it", stop)
    assert done.out == whole[: whole.index(stop)] + "\n"
    assert int(STATS.match(done.err)[1]) < 24


def tiny(folder: Path, **fields: object) -> Path:
    """A converted random model of the GLM-4 kind with the small GLM-4 tokenizer, which never ends an answer."""
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "kv_channels": 16, "ffn_hidden_size": 32}
    sizes |= {"padded_vocab_size": 1536, "eos_token_id": 1535, "pad_token_id": 1500}
    make_checkpoint(folder / "tiny", config_json("glm-4-9b-chat", **{**sizes, **fields}))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tokenizer_glm4" / name, folder / "tiny" / name)
    return convert(folder / "tiny", folder / "tiny-ov", ["bf16"], progress=False)


# Refused


def test_positions_beyond_the_table(tmp_path: Path, run: Run) -> None:
    short = tiny(tmp_path, seq_length=32)
    told = run("generate", short, "--prompt", "好" * 100).error
    assert re.search(r"prompt is 1\d\d tokens long, expected fewer than 32", told)
    told = run("generate", short, "--prompt", "好" * 100, "--raw").error
    assert "position" in told and "seq_length 32" in told
    done = run("generate", short, "--prompt", "你好", "--raw", "--max-new-tokens", 100)
    prompt = len(load_tokenizer(short)(["你好"])["input_ids"][0])
    assert done.code == 0 and int(STATS.match(done.err)[1]) == 32 - prompt + 1


def test_ids_out_of_the_vocabulary(tmp_path: Path, run: Run) -> None:
    told = run("generate", tiny(tmp_path, padded_vocab_size=1024, eos_token_id=1023), "--prompt", "你好").error
    assert re.search(r"input_ids is a token id 15\d\d, expected 0 to 1023", told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", ""], "--prompt: text is empty, expected at least one character"),
        (["--prompt", "你好", " \n"], "--prompt: text is empty"),
        (["--prompt", "\udcff"], "--prompt: text is not in the terminal's encoding"),
        ([], "generate: prompt is missing, expected --prompt TEXT or --prompt-file FILE"),
        (["--prompt-file", "none.txt"], "none.txt: No such file or directory"),
        (["--prompt", "你好", "--raw", "--system", "x"], "--system: value is given, expected none with --raw"),
        (["--prompt", "你好", "--threads", "0"], "argument --threads: invalid int from 1 value"),
        (["--prompt", "你好", "--weight-format", "int4"], "weight_format is 'int4', expected one of"),
        (["--prompt", "你好", "--inference-precision", "f8"], "invalid choice: 'f8'"),
        (["--prompt", "你好", "--temperature", "0.5"], "--temperature: value is 0.5, expected --do-sample with it"),
        (["--prompt", "你好", "--do-sample", "--temperature", "-1"], "argument --temperature: invalid"),
        (["--prompt", "你好", "--do-sample", "--top-p", "1.5"], "argument --top-p: invalid"),
        (["--prompt", "你好", "--do-sample", "--num-beams", "2"], "--num-beams: value is 2, expected 1"),
        (["--prompt", "你好", "--max-new-tokens", "0"], "argument --max-new-tokens: invalid"),
        (["--prompt", "你好", "--seed", "nan"], "argument --seed: invalid"),
    ],
)
def test_wrong_arguments(arguments: list[str], told: str, converted: Path, run: Run) -> None:
    assert told in run("generate", converted, *arguments).error


def test_a_checkpoint_that_is_not_converted(checkpoint: Path, run: Run) -> None:
    assert str(checkpoint) in run("generate", checkpoint, "--prompt", "你好").error


def test_a_folder_without_tokenizer(converted: Path, tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "bare"))
    (folder / "tokenizer.model").unlink()
    assert "tokenizer file is missing" in run("generate", folder, "--prompt", "你好").error


# As a program of its own


def test_bytes_of_the_standard_input(converted: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines may end as on Windows; what is not in the encoding is told, as it is of a file."""
    asked = ("generate", converted, "--max-new-tokens", 8, "--raw", *EXACT, "--prompt")

    def given(data: bytes, encoding: str = "utf-8") -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))

    expected = run(*asked, "你好\n再见").out
    for data, encoding in (("\ufeff你好\r\n再见\r\n".encode(), "utf-8"), ("你好\r\n再见\n".encode("gbk"), "gbk")):
        given(data, encoding)
        assert run(*asked, "-").out == expected
    given("你好".encode("gbk"))
    assert run(*asked, "-").error.startswith("standard input: encoding is not UTF-8")


def test_options_before_the_folder_are_told_where_they_stand(converted: Path, run: Run) -> None:
    told = run("generate", "--prompt", "你好", converted).error
    assert told == (
        "the following arguments are required: folder (see chatglm-ov generate --help; options stand behind FOLDER)"
    )


def test_a_terminal_that_knows_no_chinese(converted: Path, run: Run) -> None:
    asked = ("generate", converted, "--prompt", "你好", "--raw", "--max-new-tokens", 8, *EXACT)
    done = finish(spawn(*PROGRAM, *asked, env={"PYTHONIOENCODING": "ascii"}))
    text = run(*asked).out
    assert done.code == 0 and not text.isascii()
    assert done.out == text.encode("ascii", "replace").decode()


def test_a_reader_that_goes_away(converted: Path) -> None:
    process = spawn(*PROGRAM, "generate", converted, "--prompt", "你好", "--raw", "--max-new-tokens", 4000)
    assert process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 141
    assert error == ""


def test_text_is_shown_as_it_comes(converted: Path) -> None:
    """Every piece of text is shown as soon as its last token is there."""
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(converted, "f32", "f32"), load_tokenizer(converted)
    shown: list[str] = []
    done = complete(model, tokenizer, "你好", shown.append, do_sample=False, max_new_tokens=24)
    assert shown[-1] == done.text
    assert len(set(shown)) > 12
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert done.timing.tokens == 24


@pytest.mark.parametrize(
    "fields",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_generation_config_of_many_kinds(fields: dict, converted: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(converted, tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for raw in ([], ["--raw"]):
        done = run("generate", folder, "--prompt", "床前明月光", "--max-new-tokens", 4, "--no-stream", *EXACT, *raw)
        assert (done.code, done.err.count("error")) == (0, 0)


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_stop_texts_of_a_generation_config(raw: list[str], converted: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(converted, tmp_path / "model")
    asked = ("generate", folder, "--prompt", "床前明月光", "--max-new-tokens", 12, "--no-stream", *EXACT, *raw)
    whole = run(*asked).out.strip()
    stop = whole[len(whole) // 2]
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_strings": [stop]}))
    done = run(*asked)
    assert (done.code, done.out.strip()) == (0, whole.partition(stop)[0].strip())
