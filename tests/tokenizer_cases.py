"""Tokenizers and goldens that the tokenizer, chat and stream tests go through."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from chatglm_ov.tokenizer import load_tokenizer

TESTS = Path(__file__).parent
DATA = TESTS / "data"
GOLDEN = TESTS.parent.parent / "shared" / "golden"

# name: (folder of the tokenizer, its goldens)
SETS = {
    "v1": (DATA / "tokenizer_v1", DATA / "tokenizer_v1" / "tokenization.json"),
    "v1_real": (GOLDEN / "v1" / "tokenizer_real", GOLDEN / "v1" / "tokenization_real.json"),
    "v2": (GOLDEN / "v2" / "tokenizer", GOLDEN / "v2" / "tokenization.json"),
    "v3": (GOLDEN / "v3" / "tokenizer", GOLDEN / "v3" / "tokenization.json"),
    "glm4": (DATA / "tokenizer_glm4", DATA / "tokenizer_glm4" / "tokenization.json"),
}
_TEXT = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。 The quick brown fox jumps over the lazy dog. print(x)\n"
    "[Round 1] 问：你好 答：我是人工智能助手。 def main(argv): return 0 # 1234567890 + - * / = < > { } [ ]\n"
)


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a set. Skips where its vocabulary is beside the project only, and the project stands alone."""
    folder = SETS[name][0]
    if not folder.is_dir():
        pytest.skip(f"the vocabulary of {name} is in ../shared/golden, which is not here")
    return load_tokenizer(folder)


@cache
def golden_of(name: str) -> dict[str, Any]:
    tokenizer_of(name)
    return json.loads(SETS[name][1].read_text(encoding="utf-8"))


@cache
def small_sentencepiece() -> bytes:
    """A model with the properties of ChatGLM2's and ChatGLM3's (BPE, byte fallback, nothing normalized, a blank before
    the text) and few pieces, trained on the spot."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.split("\n") * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=460,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def small_folder(folder: Path, family: str) -> Path:
    """A tokenizer folder of ChatGLM2 or ChatGLM3 with the small vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(small_sentencepiece())
    config = {"name_or_path": {"chatglm2": "THUDM/chatglm2-6b", "chatglm3": "THUDM/chatglm3-6b"}[family]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# In the manner of the published templates of transformers' own classes: roles and, in the last two, tools and thinking.
GLM_TEMPLATES = {
    "edge": "{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "0414": """[gMASK]<sop>
{%- if tools -%}
<|system|>
# 可用工具
{% for tool in tools %}
{%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
{%- endfor %}
{%- endif -%}
{%- for message in messages %}
<|{{ message.role }}|>{{ message.get("metadata", "") }}
{{ message.content }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""",
    "z1": """[gMASK]<sop>
{%- for message in messages if message.role == "system" %}<|system|>
{{ message.content }}
{%- endfor %}
{%- for message in messages if message.role != "system" %}<|{{ message.role }}|>
{{ message.content.split("</think>")[-1].strip() }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
<think>{% endif %}""",
}
_GLM_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)


@cache
def fast_tokenizer_json(size: int = 400, prefix: bool = False) -> str:
    """A byte-level tokenizer.json in the manner of the GLM-4 `-hf` repositories, trained on the spot; the special
    tokens begin at `size`. `prefix`: it puts [gMASK] and <sop> before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_TEXT.split("\n") * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {f"unused {index}": index for index in range(len(model["vocab"]), size)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _GLM_SPECIAL])
    if prefix:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
        tokenizer.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A", special_tokens=ids)
    return tokenizer.to_str()


def fast_folder(folder: Path, template: str | None = "", size: int = 400, prefix: bool = False) -> Path:
    """A folder with a tokenizer.json and the template named or given; "": the published one of GLM-4, None: none."""
    if template == "":
        template = json.loads((DATA / "tokenizer_glm4" / "tokenizer_config.json").read_text())["chat_template"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
    }
    if template is not None:
        config["chat_template"] = GLM_TEMPLATES.get(template, template)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(fast_tokenizer_json(size, prefix), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
