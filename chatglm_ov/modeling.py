"""`OVChatGLMForCausalLM`: a converted folder as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatglm_ov.config import ArchitectureConfig, read_config_json
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.generation.cache import CACHE_NAME, Session, StateCache, one_cache
from chatglm_ov.generation.chat import ChatMixin
from chatglm_ov.generation.inputs import Step, pieces, prepare, refuse_tensors
from chatglm_ov.generation.mixin import StatefulGenerationMixin
from chatglm_ov.generation.speculative import Speculation
from chatglm_ov.runtime.loading import load_model
from chatglm_ov.system.memory import give_back

PromptProgress = Callable[[int, int], None]
"""Called with the columns of a prompt that are done, and with all of them."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields of published files that would switch on parts of transformers that have no say here.
_LEFT_OUT = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "text_config",
    "torch_dtype",
    "transformers_version",
}


# Arguments of other libraries' from_pretrained(). What these ask for is so in any case, or has no meaning here.
_WITHOUT_EFFECT = {
    "cache_dir", "compile", "force_download", "local_files_only", "low_cpu_mem_usage", "revision", "token",
    "trust_remote_code", "use_cache", "use_safetensors",
}  # fmt: skip
_PRECISION = "weight_format (of the weights) or inference_precision (of the arithmetic)"
# These have another name here, beside the values, besides None, that ask for nothing.
_NAMED_OTHERWISE: dict[str, tuple[tuple[str, ...], str]] = {
    "device_map": (("auto", "cpu"), "device"),
    "dtype": (("auto",), _PRECISION),
    "torch_dtype": (("auto",), _PRECISION),
    "quantization_config": ((), "weight_format"),
    "load_in_8bit": ((), "weight_format='int8'"),
    "load_in_4bit": ((), "weight_format='int4'"),
    "export": ((), "a converted folder: chatglm-ov convert"),
    "ov_config": ((), "properties"),
    "attn_implementation": ((), "none: attention is part of the converted model"),
}


class OVChatGLMConfig(PretrainedConfig):
    """The fields of config.json under their own names, and those that `generate()` asks for:
    `vocab_size` (rows of the LM head), `num_hidden_layers`, `max_position_embeddings` (where there is a limit)."""

    model_type = "chatglm"

    @classmethod
    def from_folder(cls, folder: Path | str, architecture: ArchitectureConfig) -> OVChatGLMConfig:
        """The fields of `folder/config.json`, whose typed form is `architecture`."""
        generation = set(vars(GenerationConfig())) - set(_TOKEN_IDS)
        # What the base class has of its own, methods and computed fields among them, says nothing of these models.
        own = set(dir(PretrainedConfig)) - {"model_type"}
        fields = {k: v for k, v in read_config_json(folder).items() if k not in generation | own | _LEFT_OUT}
        fields |= {name: getattr(architecture, name) for name in _TOKEN_IDS}
        fields |= {"vocab_size": architecture.vocab_rows, "num_hidden_layers": architecture.num_layers}
        if architecture.max_positions is not None:
            fields["max_position_embeddings"] = architecture.max_positions
        fields |= {"is_encoder_decoder": False, "name_or_path": str(Path(folder).absolute())}
        return cls(**fields)


class OVChatGLMForCausalLM(ChatMixin, StatefulGenerationMixin, PreTrainedModel):
    """A model of the ChatGLM family on OpenVINO.

    It owns one infer request, so one KV cache: a call without `past_key_values` begins a new sequence in it, the
    cache object that a call returns stands for it, and an older object is refused. For several sequences at once,
    `OVChatGLMForCausalLM(model.config, model.compiled)` gives another request over the same weights.
    """

    config_class = OVChatGLMConfig
    main_input_name = "input_ids"

    def __init__(self, config: OVChatGLMConfig, compiled: Any):
        super().__init__(config)
        self.compiled = compiled
        self.session = Session(compiled.create_request(), config.num_hidden_layers)
        self.prompt_progress: PromptProgress | None = None
        self.speculation: Speculation | None = None
        self.reused_tokens = 0
        self.post_init()
        self.eval()
        self.generation_config = _generation_config(Path(str(config.name_or_path)), compiled.config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: Path | str,
        weight_format: str | None = None,
        inference_precision: str | None = None,
        device: str = "CPU",
        properties: dict[str, Any] | None = None,
        kv_cache_format: str | None = None,
        activation_bits: int = 16,
        **others: Any,
    ) -> OVChatGLMForCausalLM:
        """Open a converted folder.

        `weight_format` None: int8 if it is there, else bf16, else the first. `inference_precision` ("f32",
        "bf16") None: what the device prefers. `properties`: further OpenVINO properties. `kv_cache_format` ("f32",
        "bf16", "int8") None: f32 if the inference precision is, else bf16. `activation_bits` 8: faster prompts,
        less exact, with int8 and int4 weights of a folder with fused operations. `others` are there for code that was
        written for other libraries: `trust_remote_code`, `low_cpu_mem_usage` and the like change nothing, ChatGLMError
        says what stands here for `dtype`, `ov_config`, ... Nothing in a folder is executed in any case.
        """
        _check_others(others)
        compiled = load_model(
            folder, weight_format, inference_precision, device, properties, kv_cache_format, activation_bits
        )
        return cls(OVChatGLMConfig.from_folder(folder, compiled.config), compiled)

    @classmethod
    def _from_config(cls, config: OVChatGLMConfig, **kwargs: Any) -> Any:
        """What `AutoModelForCausalLM.from_config` calls, for a model with random weights: not offered."""
        raise ChatGLMError("from_config", "weights", "none", "from_pretrained() with a converted folder")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: the converted folder is the saved form, and complete by itself."""
        folder = self.config.name_or_path
        raise ChatGLMError("save_pretrained", "model", "a converted one", f"a copy of the folder {folder}")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Not offered, as there is nothing to save."""
        raise ChatGLMError("push_to_hub", "model", "a converted one", "an upload of its folder by huggingface_hub")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Not offered: neither pickle nor copy can take an open model along."""
        wanted = f"from_pretrained({str(self.config.name_or_path)!r}) in each process, which share the file's memory"
        raise ChatGLMError(type(self).__name__, "pickle", "an open model", wanted)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: the model is compiled when it is opened."""

    @property
    def device(self) -> torch.device:
        """Where the tensors that go in and come out live."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the logits."""
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: StateCache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = True,
        prompt_copies: int = 1,
        return_dict: bool | None = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: StateCache | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: None = None,
        token_type_ids: None = None,
        cache_position: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token after each column, float32 [B, L, V], and the cache.

        `input_ids` int64 [B, L]. `attention_mask` None (every column is seen), int or bool [B, past + L] with
        1 = token, or the first generation's [B, 1, L, past + L] with 1 = not seen. `position_ids` int64 [B, L]
        ([B, 2, L] in the first generation), None: as the original makes them. `past_key_values` None begins a new
        sequence; the cache that the last call returned continues it; `cache` is its name from transformers 5.24 on.
        `logits_to_keep` n > 0: the last n only.
        `prompt_copies` n: each row is computed and stored once, and stands for n rows of the result and of the cache.
        Long inputs are computed in pieces; `prompt_progress` is told of them. `labels` int64 [B, L], -100 where there
        is none: the loss is the mean of -ln p of each but the first, as the column before predicts it.
        `cache_position` is not looked at: new columns follow those in the cache.
        """
        refuse_tensors("forward", inputs_embeds=inputs_embeds, token_type_ids=token_type_ids)
        _refuse(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        kept = _last_columns(logits_to_keep)
        given = one_cache({"past_key_values": past_key_values, "cache": cache})
        with self.session.request.turns.taken():
            cache, logits = self._forward(input_ids, attention_mask, position_ids, given, kept)
            self.session.bind(given)
            if prompt_copies > 1:
                logits = logits.repeat(prompt_copies, axis=0)
                cache.batch_repeat_interleave(prompt_copies)
        handle = cache if use_cache is not False else None
        loss = None if labels is None else _loss(torch.from_numpy(logits), labels)
        output = CausalLMOutputWithPast(loss=loss, logits=torch.from_numpy(logits), **{CACHE_NAME: handle})  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output

    def _forward(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        given: Any,
        logits_to_keep: int,
    ) -> tuple[StateCache, np.ndarray]:
        cache = self._checked_cache(given)
        if cache is not None and cache.get_seq_length() == 0:
            cache = None
        step = prepare(self.compiled, input_ids, attention_mask, position_ids, cache)
        if cache is None:
            cache = self.session.restart(len(step.ids), step.prefix)
        self.session.request.check_positions(step.position_ids)
        return cache, self._fed(step, cache, logits_to_keep)

    def release_cache(self) -> None:
        """Give the memory of the KV cache back to the system: by itself it stays for the next sequence, as large as the
        largest so far. The next call begins a new sequence; a cache object of an earlier one is refused."""
        with self.session.request.turns.taken():
            self.session.renew(self.compiled.create_request())
        # The plugin lets go of the memory of a request that is gone when it runs another.
        self.compiled.warm_up()
        give_back()

    def _fed(self, step: Step, cache: StateCache, logits_to_keep: int) -> np.ndarray:
        """Feed the columns of `step` piece by piece; logits [B, kept, V]. A piece that fails leaves in the cache what
        was fed before it."""
        total, columns = step.ids.shape[1], cache.columns
        past = columns.keep.shape[1]
        first_kept = 0 if logits_to_keep == 0 else max(0, total - logits_to_keep)
        parts = list(pieces(step, past))
        if len(parts) > 1:
            self.session.request.reserve(step.keep)
        kept = []
        for piece in parts:
            ids, positions, keep = step.ids[:, piece], step.position_ids[..., piece], step.keep[:, : past + piece.stop]
            wanted = piece.stop - max(piece.start, first_kept)
            logits = self.session.request.infer(
                ids,
                keep.astype(np.int64),
                positions,
                columns.beam_idx,
                logits_to_keep=max(1, wanted),
                prefix_length=step.prefix,
            )
            columns.append(ids, keep, positions)
            if wanted > 0:
                kept.append(logits)
            if self.prompt_progress is not None and total > 1:
                self.prompt_progress(piece.stop, total)
        return kept[0] if len(kept) == 1 else np.concatenate(kept, axis=1)


def _check_others(others: dict[str, Any]) -> None:
    """Raise for an argument of `from_pretrained` that would not be followed."""
    for name, value in others.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _NAMED_OTHERWISE:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")
        harmless, wanted = _NAMED_OTHERWISE[name]
        if value is not None and value is not False and not (isinstance(value, str) and value in harmless):
            raise ChatGLMError("from_pretrained", name, repr(value), wanted)


def _last_columns(logits_to_keep: int | torch.Tensor) -> int:
    """A number, which may come as a tensor without dims."""
    try:
        if getattr(logits_to_keep, "ndim", 0) == 0 and (count := index(logits_to_keep)) >= 0:
            return count
    except TypeError:
        pass
    raise ChatGLMError("forward", "logits_to_keep", logits_to_keep, "0 (all) or a number of last columns")


def _refuse(**wishes: bool | None) -> None:
    for name, wished in wishes.items():
        if wished:
            raise ChatGLMError("forward", name, True, "False: the compiled model gives logits only")


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.shape != logits.shape[:2]:
        raise ChatGLMError(
            "forward", "labels", f"of shape {list(labels.shape)}", f"{list(logits.shape[:2])}, as logits"
        )
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _generation_config(folder: Path, architecture: ArchitectureConfig) -> GenerationConfig:
    """generation_config.json, if it is there; the special ids that it leaves out come from config.json."""
    config = GenerationConfig()
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            config = GenerationConfig.from_pretrained(folder)
        except (OSError, TypeError, ValueError) as error:
            seen = f"unusable ({str(error).splitlines()[0]})"
            raise ChatGLMError(path, "contents", seen, "the fields of a GenerationConfig") from error
    for name in _TOKEN_IDS:
        ids = getattr(config, name)
        if not all(isinstance(index, int) for index in (ids if isinstance(ids, list) else [ids or 0])):
            raise ChatGLMError(path, name, repr(ids), "a token id or a list of them")
        if ids is None:
            setattr(config, name, getattr(architecture, name))
    return config


# Where transformers' pipelines look which classes write text; they warn of all others, and name those.
AutoModelForCausalLM.register(OVChatGLMConfig, OVChatGLMForCausalLM, exist_ok=True)
