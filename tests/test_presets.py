"""Presets of the released models, and the random weights at their shapes."""

from __future__ import annotations

import numpy as np
import pytest

from chatglm_ov.checkpoint.random_weights import RandomTensor, stored_tensors
from chatglm_ov.config import parse_config
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.presets import PRESETS, config_json


@pytest.mark.parametrize(
    ("preset", "count", "nbytes"),
    [
        # total_size of the released index files; that of chatglm-6b still refers to 150528 tokens.
        ("chatglm-6b", 368, 13_744_473_856),
        ("chatglm2-6b", 200, 12_487_168_064),
        ("chatglm2-6b-32k", 200, 12_487_168_064),
        ("chatglm3-6b", 200, 12_487_168_064),
        ("chatglm3-6b-32k", 200, 12_487_168_064),
        ("chatglm3-6b-128k", 200, 12_487_168_064),
        ("codegeex2-6b", 200, 12_487_168_064),
        ("glm-4-9b-chat", 284, 2 * 9_399_951_360 + 64),
        ("glm-4-9b-chat-1m", 284, 2 * 9_483_857_920 + 64),
        ("codegeex4-all-9b", 284, 2 * 9_399_951_360 + 64),
        ("glm-4-9b-chat-hf", 443, 2 * 9_399_951_360),
        ("glm-4-9b-chat-1m-hf", 443, 2 * 9_483_857_920),
        # Its head is tied, and in the file all the same.
        ("glm-edge-1.5b-chat", 227, 2 * 1_593_427_968),
        ("glm-edge-4b-chat", 323, 2 * 4_327_984_128),
        ("glm-4-9b-0414", 523, 2 * 9_400_279_040),
        ("glm-z1-9b-0414", 523, 2 * 9_400_279_040),
        ("glm-4-32b-0414", 613, 2 * 32_566_081_536),
        ("glm-z1-32b-0414", 613, 2 * 32_566_081_536),
    ],
)
def test_preset_has_the_size_of_the_released_checkpoint(preset: str, count: int, nbytes: int) -> None:
    fields = config_json(preset, **({"vocab_size": 150528} if preset == "chatglm-6b" else {}))
    tensors = stored_tensors(fields)
    assert len({tensor.name for tensor in tensors}) == len(tensors) == count
    assert sum(tensor.nbytes for tensor in tensors) == nbytes


def test_every_preset_is_covered_and_understood() -> None:
    assert len(PRESETS) == 18
    meanings = {}
    for preset in PRESETS:
        config = parse_config(config_json(preset))
        assert "auto_map" not in config_json(preset)
        meanings[preset] = (
            getattr(config, "rope_ratio_meaning", None) if getattr(config, "rope_ratio", 1) != 1 else None
        )
    assert meanings.pop("chatglm2-6b-32k") == "position"
    ratios = {
        "chatglm3-6b-32k": "base",
        "chatglm3-6b-128k": "base",
        "glm-4-9b-chat": "base",
        "glm-4-9b-chat-1m": "base",
        "codegeex4-all-9b": "base",
    }
    assert {preset: meaning for preset, meaning in meanings.items() if meaning} == ratios


def test_config_json_replaces_fields_and_their_copies() -> None:
    fields = config_json("glm-4-9b-chat", num_layers=3, padded_vocab_size=512, rope_ratio=2)
    assert fields["num_layers"] == fields["num_hidden_layers"] == 3
    assert fields["padded_vocab_size"] == fields["vocab_size"] == 512
    assert fields["rope_ratio"] == 2
    fields["eos_token_id"].append(1)
    assert config_json("glm-4-9b-chat")["eos_token_id"] == [151329, 151336, 151338]
    assert "num_hidden_layers" not in config_json("chatglm3-6b", num_layers=3)


def test_unknown_preset() -> None:
    with pytest.raises(ChatGLMError, match=r"'chatglm4'.*chatglm3-6b"):
        config_json("chatglm4")


def values(tensor: RandomTensor, seed: int = 0) -> np.ndarray:
    drawn = np.concatenate(list(tensor.blocks(seed))).reshape(tensor.shape)
    assert drawn.dtype == tensor.dtype
    return drawn.astype(np.float32)


def test_values() -> None:
    """Normal, of the promised deviation, over several blocks, no row like another, tensors unlike each other."""
    sizes = {"hidden_size": 512, "ffn_hidden_size": 512, "padded_vocab_size": 8192, "num_layers": 2}
    tensors = {tensor.name: tensor for tensor in stored_tensors(config_json("chatglm3-6b", **sizes))}
    head = values(tensors["transformer.output_layer.weight"])
    assert head.shape == (8192, 512)
    scaled = head * np.sqrt(512)
    assert abs(scaled.mean()) < 2e-3
    assert scaled.std() == pytest.approx(1, abs=2e-3)
    assert (scaled**4).mean() == pytest.approx(3, abs=0.02)
    assert len(np.unique(head[:, :8], axis=0)) == len(head)

    layer = "transformer.encoder.layers.0"
    norm = values(tensors[f"{layer}.input_layernorm.weight"])
    assert norm.mean() == pytest.approx(1, abs=0.01)
    assert norm.std() == pytest.approx(0.05, rel=0.15)
    assert values(tensors[f"{layer}.self_attention.query_key_value.bias"]).std() == pytest.approx(0.02, rel=0.1)
    dense = values(tensors[f"{layer}.self_attention.dense.weight"])
    assert dense.std() == pytest.approx(4096**-0.5, rel=0.01)

    embedding = values(tensors["transformer.embedding.word_embeddings.weight"])
    other = values(tensors["transformer.encoder.layers.1.self_attention.dense.weight"])
    reseeded = values(tensors["transformer.output_layer.weight"], seed=1)
    for one, two in [(head, embedding), (dense, other), (head, reseeded)]:
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.01
