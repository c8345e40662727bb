"""The trained model as a checkpoint folder in ChatGLM3's layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .model import ChatGLM3, Size, inverse_frequencies
from .vocabulary import EOS

NAME = "chatglm3-tang-poems"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"  # in every original file, never read
REMOTE = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


def config(size: Size) -> dict:
    """config.json in ChatGLM3-6B's form; `auto_map` names the original's classes, whose code is not needed."""
    return {
        "_name_or_path": NAME,
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": REMOTE,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": size.ffn_hidden_size,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": size.hidden_size,
        "kv_channels": size.kv_channels,
        "layernorm_epsilon": size.layernorm_epsilon,
        "multi_query_attention": True,
        "multi_query_group_num": size.multi_query_group_num,
        "num_attention_heads": size.num_attention_heads,
        "num_layers": size.num_layers,
        "original_rope": True,
        "padded_vocab_size": size.padded_vocab_size,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": size.seq_length,
        "use_cache": True,
        "torch_dtype": "float16",
        "transformers_version": "4.30.2",
        "tie_word_embeddings": False,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }


TOKENIZER_CONFIG = {
    "name_or_path": NAME,
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: ChatGLM3, tokenizer: bytes) -> None:
    """config.json, model.safetensors (float16), tokenizer.model and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(model.size))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    weights[INV_FREQ] = inverse_frequencies(model.size).to(torch.float16)
    save_file(weights, path := folder / "model.safetensors", metadata={"format": "pt"})
    path.chmod(0o644)


def read_checkpoint(folder: Path) -> ChatGLM3:
    """The model of a checkpoint folder, computing in float32 from the stored float16 weights."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = ChatGLM3(Size(**{name: values[name] for name in Size.__dataclass_fields__}))
    weights = load_file(folder / "model.safetensors")
    weights.pop(INV_FREQ)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()
