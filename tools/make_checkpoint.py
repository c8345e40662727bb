#!/usr/bin/env python
"""Write a checkpoint with random weights at a released model's shapes, in the ordinary folder layout.

    python tools/make_checkpoint.py OUT --preset chatglm3-6b
    python tools/make_checkpoint.py OUT --preset glm-4-9b-chat --layers 2 --hidden-size 256 --num-attention-heads 4 \
        --kv-channels 64 --ffn-hidden-size 512 --vocab-size 1536 --seq-length 512 --set eos_token_id=1500

Equal --seed, equal values, whatever the format and the shards. Memory stays at a few blocks of values, whatever the
size of the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from chatglm_ov.checkpoint.files import FLOATS
from chatglm_ov.checkpoint.random_weights import RandomTensor, stored_tensors
from chatglm_ov.conversion.finished_folder import check_disk, finished_or_nothing
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.presets import PRESETS, config_json

SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
STEMS = {"safetensors": "model", "bin": "pytorch_model"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

TOKENIZER_FILES = ("ice_text.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

# Options for sizes: the config field of ChatGLM-6B, of the later models in the original layout, and of those of
# transformers. None: there is no such field.
SIZES = {
    "layers": ("num_layers", "num_layers", "num_hidden_layers"),
    "hidden_size": ("hidden_size", "hidden_size", "hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "vocab_size"),
    "ffn_hidden_size": ("inner_hidden_size", "ffn_hidden_size", "intermediate_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads", "num_attention_heads"),
    "kv_channels": (None, "kv_channels", "head_dim"),
    "multi_query_group_num": (None, "multi_query_group_num", "num_key_value_heads"),
    "seq_length": ("max_sequence_length", "seq_length", "max_position_embeddings"),
}


def split_into_shards(tensors: list[RandomTensor], limit: int) -> list[list[RandomTensor]]:
    """Consecutive tensors of at most `limit` bytes together; a larger tensor has a shard of its own."""
    shards: list[list[RandomTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_safetensors(file: Path, tensors: list[RandomTensor], seed: int, progress: tqdm) -> None:
    """Header and data in one pass: all offsets are known beforehand."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        dtype = SAFETENSORS_NAMES[tensor.dtype.name]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            progress.set_postfix_str(tensor.name, refresh=False)
            for block in tensor.blocks(seed):
                stream.write(block.view(np.uint8).data)
                progress.update(block.nbytes)


def write_bin(file: Path, tensors: list[RandomTensor], seed: int, progress: tqdm) -> None:
    """torch.save wants whole tensors: they are mapped from a safetensors file, so they need no memory."""
    import torch
    from safetensors.torch import load_file

    mapped = file.with_suffix(".tmp")
    write_safetensors(mapped, tensors, seed, progress)
    torch.save(load_file(mapped), file)
    mapped.unlink()


def write_weights(folder: Path, shards: list[list[RandomTensor]], file_format: str, seed: int) -> None:
    stem, extension = STEMS[file_format], f".{file_format}"
    write = write_safetensors if file_format == "safetensors" else write_bin
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}{extension}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}{extension}"]
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name.strip(".").partition(".partial")[0]) as progress:
        for name, shard in zip(names, shards, strict=True):
            write(folder / name, shard, seed, progress)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{stem}{extension}.index.json", index)


def write_json(file: Path, contents: Any) -> None:
    file.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ChatGLMError(output, "output", "a file", "a new folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ChatGLMError(output, "output", "a folder that is not empty", "a new folder, or --overwrite")


def bytes_on_disk(shards: list[list[RandomTensor]], file_format: str) -> int:
    """At most: a .bin is written from a shard in the other format."""
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    return sum(sizes) + (max(sizes) if file_format == "bin" else 0)


def tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ChatGLMError(folder, "tokenizer", "missing", f"one of {', '.join(TOKENIZER_FILES)}")
    return files


def make_checkpoint(
    output: Path,
    fields: dict[str, Any],
    *,
    file_format: str = "safetensors",
    shard_size: int = 2 * 10**9,
    seed: int = 0,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write config.json, weights of its `torch_dtype`, and the tokenizer files of the folder `tokenizer`.

    Raises ChatGLMError for a config that names no known model, for too little disk space, and for an output that
    is in use; then nothing is written.
    """
    shards = split_into_shards(stored_tensors(fields), shard_size)
    files = tokenizer_files(tokenizer)
    check_output(output, overwrite)
    check_disk(output, bytes_on_disk(shards, file_format), "the weights")
    with finished_or_nothing(output.resolve(), overwrite) as folder:
        write_json(folder / "config.json", fields)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        write_weights(folder, shards, file_format, seed)


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def parse_size(text: str) -> int:
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in UNITS else (text, "")
    size = int(float(number) * UNITS.get(unit, 1))
    if size <= 0:
        raise ValueError
    return size


def parse_field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def config_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The preset's config.json with the sizes and fields of the command line."""
    marks = ("inner_hidden_size", "ffn_hidden_size", "intermediate_size")
    generation = next(i for i, mark in enumerate(marks) if mark in PRESETS[arguments.preset])
    overrides = {"torch_dtype": arguments.dtype} if arguments.dtype else {}
    for option, names in SIZES.items():
        value, name = getattr(arguments, option), names[generation]
        if value is not None:
            if name is None:
                raise ChatGLMError(arguments.preset, option, value, "nothing: this model has no such field")
            overrides[name] = value
    return config_json(arguments.preset, **{**overrides, **dict(arguments.set)})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description = "Write a checkpoint with random weights at a released model's shapes."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--preset", choices=PRESETS, required=True)
    for option in SIZES:
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="N")
    field_help = "any other field of config.json; special token ids, for a small vocabulary"
    parser.add_argument("--set", type=parse_field, action="append", default=[], metavar="FIELD=VALUE", help=field_help)
    parser.add_argument("--dtype", choices=FLOATS, help="default: that of the released files")
    parser.add_argument("--format", choices=STEMS, default="safetensors")
    parser.add_argument(
        "--shard-size", type=parse_size, default="2GB", metavar="SIZE", help="such as 500MB; default 2GB"
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy the tokenizer files of this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        make_checkpoint(
            arguments.output,
            config_fields(arguments),
            file_format=arguments.format,
            shard_size=arguments.shard_size,
            seed=arguments.seed,
            tokenizer=arguments.tokenizer,
            overwrite=arguments.overwrite,
        )
    except ChatGLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
