"""config.json of each architecture, one class per architecture, fields named as in the file.

Unknown fields are kept out of the way; a known field of the wrong type, or a value that the architecture's
definition does not cover, is an error that names the field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.field_errors import field_error
from chatglm_ov.json_files import read_json_object
from chatglm_ov.published_names import is_chatglm2
from chatglm_ov.rope_scaling import RopeScaling


class ArchitectureConfig(BaseModel):
    """What the later parts may ask of every architecture, whatever its own field names are."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    architecture: ClassVar[str]
    """Name of the module in `chatglm_ov.models` that defines the model."""
    heads_field: ClassVar[str] = "num_key_value_heads"
    head_dim_field: ClassVar[str] = "head_dim"
    positions_field: ClassVar[str] = "max_position_embeddings"
    """Fields of the file that these three come from."""
    sees_whole_prompt: ClassVar[bool] = False
    has_rotary_table: ClassVar[bool] = True
    """Whether the original computes the angles of its positions once and has none for later ones."""
    """Whether a token of the prompt sees those behind it too."""
    takes_trained_prefix: ClassVar[bool] = False
    """Whether a checkpoint may hold a prefix encoder (`chatglm_ov.checkpoint.trained_prefix`)."""
    reads_stored_lm_head: ClassVar[bool] = True
    """Whether the original reads an LM head that is stored and is not the embedding, though `tie_word_embeddings` is
    true."""

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False
    # Of weights that are stored quantized; see `chatglm_ov.checkpoint.prequantized`.
    quantization_bit: Literal[0, 4, 8] | None = None
    pre_seq_len: int | None = Field(None, ge=0)
    """Tokens of a trained prefix (P-Tuning v2) before every sequence; see `chatglm_ov.checkpoint.trained_prefix`."""

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """Token ids that every prompt ends with, as the position rules want it."""
        return ()

    @property
    def position_marks(self) -> tuple[int, ...]:
        """Token ids that the position rules look for: they stand nowhere else in a prompt."""
        return ()

    def check(self, where: Path | str) -> None:
        """Raises ChatGLMError for fields of `where` that do not fit each other."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ChatGLMError(where, self.heads_field, groups, f"a divisor of num_attention_heads {heads}")
        if self.head_dim % 4:
            raise ChatGLMError(where, self.head_dim_field, self.head_dim, "a multiple of 4")

    @property
    def position_limit(self) -> int | None:
        """Positions from here on are refused, as the original has no row for them in its rotary table; None: no
        limit."""
        return self.max_positions if self.has_rotary_table else None

    if TYPE_CHECKING:
        # Fields of some architectures, computed by others.

        @property
        def vocab_rows(self) -> int:
            """Rows of the embedding and of the LM head."""

        @property
        def num_key_value_heads(self) -> int:
            """Heads of keys and values in the cache."""

        @property
        def head_dim(self) -> int:
            """Features of one head."""

        @property
        def max_positions(self) -> int | None:
            """Positions that the model was made for, with what `rope_scaling` adds; None where the configuration tells
            of none."""


class ChatGLMConfig(ArchitectureConfig):
    """ChatGLM-6B (first generation). Defaults are those of the original class where the file may leave them out."""

    architecture: ClassVar[str] = "chatglm"
    head_dim_field: ClassVar[str] = "hidden_size / num_attention_heads"
    sees_whole_prompt: ClassVar[bool] = True
    takes_trained_prefix: ClassVar[bool] = True
    reads_stored_lm_head: ClassVar[bool] = False

    vocab_size: int = Field(gt=0)
    inner_hidden_size: int = Field(gt=0)
    layernorm_epsilon: float = Field(1e-5, gt=0)
    max_sequence_length: int = Field(2048, gt=0)
    position_encoding_2d: Literal[True] = True
    bos_token_id: int
    eos_token_id: int | list[int]
    mask_token_id: int
    gmask_token_id: int
    # Neither the field nor a separate lm_head is promised: transformers ties unless told otherwise.
    tie_word_embeddings: bool = True

    @model_validator(mode="before")
    @classmethod
    def _early_revisions_leave_out_mask_ids(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """In every released vocabulary `[MASK]` and `[gMASK]` stand 4 and 3 before `<sop>`."""
        bos = fields.get("bos_token_id")
        if not isinstance(bos, int):
            return fields
        return {"mask_token_id": bos - 4, "gmask_token_id": bos - 3, **fields}

    @property
    def vocab_rows(self) -> int:
        return self.vocab_size

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int | None:
        return None

    @property
    def prompt_end(self) -> tuple[int, ...]:
        return self.gmask_token_id, self.bos_token_id

    @property
    def position_marks(self) -> tuple[int, ...]:
        return *self.prompt_end, self.mask_token_id

    def check(self, where: Path | str) -> None:
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ChatGLMError(where, "hidden_size", self.hidden_size, f"a multiple of num_attention_heads {heads}")
        super().check(where)


RopeRatioMeaning = Literal["position", "base"]


class ChatGLM2Config(ArchitectureConfig):
    """ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2, GLM-4-9B and codegeex4 in the original (remote code) layout."""

    architecture: ClassVar[str] = "chatglm2"
    takes_trained_prefix: ClassVar[bool] = True
    heads_field: ClassVar[str] = "multi_query_group_num"
    positions_field: ClassVar[str] = "seq_length"
    head_dim_field: ClassVar[str] = "kv_channels"

    padded_vocab_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    kv_channels: int = Field(128, gt=0)
    seq_length: int = Field(2048, gt=0)
    layernorm_epsilon: float = Field(1e-5, gt=0)
    multi_query_attention: bool = False
    multi_query_group_num: int = Field(1, gt=0)
    add_qkv_bias: bool = False
    rope_ratio: float = Field(1.0, gt=0)
    rope_ratio_meaning: RopeRatioMeaning = "base"
    """`position`: positions are divided by `rope_ratio` (chatglm2-6b-32k). `base`: the rotary base 10000 is
    multiplied by it (all others)."""
    rope_scaling: RopeScaling | None = None
    """No published file has it: longer contexts at the user's wish."""
    # Variants that no released model uses and that the definition does not cover.
    add_bias_linear: Literal[False] = False
    rmsnorm: Literal[True] = True
    post_layer_norm: Literal[True] = True
    apply_residual_connection_post_layernorm: Literal[False] = False
    original_rope: Literal[True] = True

    @model_validator(mode="before")
    @classmethod
    def _guess_rope_ratio_meaning(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Nothing in the file says which meaning `rope_ratio` has, except where the file comes from."""
        if fields.get("rope_ratio_meaning") is not None:
            return fields
        return {**fields, "rope_ratio_meaning": "position" if is_chatglm2(fields) else "base"}

    @property
    def vocab_rows(self) -> int:
        return self.padded_vocab_size

    @property
    def num_key_value_heads(self) -> int:
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    @property
    def max_positions(self) -> int | None:
        return self.seq_length if self.rope_scaling is None else self.rope_scaling.positions(self.seq_length)


class GlmConfig(ArchitectureConfig):
    """`glm` of transformers: GLM-4-9B-chat-hf and GLM-Edge. Defaults are those of its class."""

    architecture: ClassVar[str] = "glm"
    has_rotary_table: ClassVar[bool] = False

    num_layers: int = Field(gt=0, validation_alias="num_hidden_layers")
    vocab_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(128, gt=0)
    max_position_embeddings: int = Field(131072, gt=0)
    rms_norm_eps: float = Field(1.5625e-07, gt=0)
    attention_bias: bool = True
    hidden_act: Literal["silu"] = "silu"
    rope_theta: float = Field(10000.0, gt=1, le=1e15)
    partial_rotary_factor: float = Field(0.5, gt=0, le=1)
    rope_scaling: RopeScaling | None = None

    @model_validator(mode="before")
    @classmethod
    def _rope_fields_of_both_spellings(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """transformers 5 has one object `rope_parameters`, 4 has `rope_theta`, `partial_rotary_factor` and an object
        `rope_scaling`, which is about scaling only, and which 5 takes instead of its own where both are there. What
        stands in the object goes before what stands beside it."""
        given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
        if not isinstance(given, dict):
            return {**fields, "rope_scaling": given}
        names = ("rope_theta", "partial_rotary_factor")
        inside = {name: given[name] for name in names if given.get(name) is not None}
        beside = {name: value for name, value in fields.items() if value is not None or name in names}
        scaling = given or None
        if scaling is not None and scaling.get("rope_type", scaling.get("type", "default")) == "default":
            scaling = None
        if scaling is not None and "original_max_position_embeddings" in beside:
            scaling = {"original_max_position_embeddings": beside["original_max_position_embeddings"], **scaling}
        return {**beside, **inside, "rope_scaling": scaling}

    @model_validator(mode="before")
    @classmethod
    def _head_dim_that_is_null(cls, fields: dict[str, Any]) -> dict[str, Any]:
        hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if "head_dim" in fields and fields["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int):
            return {**fields, "head_dim": hidden // max(1, heads)}
        return fields

    @property
    def vocab_rows(self) -> int:
        return self.vocab_size

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that are rotated, the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def max_positions(self) -> int | None:
        """With YaRN the files may still give the trained length."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, self.rope_scaling.positions(self.max_position_embeddings))

    def check(self, where: Path | str) -> None:
        super().check(where)
        if self.rotary_dim % 2 or self.rotary_dim < 4:
            seen = f"{self.partial_rotary_factor} of head_dim {self.head_dim}"
            raise ChatGLMError(where, "partial_rotary_factor", seen, "an even number of dims, at least 4")


class Glm4Config(GlmConfig):
    """`glm4` of transformers: GLM-4-0414 and GLM-Z1. The same fields as `glm`."""

    architecture: ClassVar[str] = "glm4"


_BY_MODEL_TYPE = {"glm": GlmConfig, "glm4": Glm4Config}


def config_class(fields: dict[str, Any], where: Path | str) -> type[ArchitectureConfig]:
    """The class of the contents of a config.json. Raises ChatGLMError where they name no known model."""
    model_type = fields.get("model_type")
    if model_type == "chatglm":
        if "padded_vocab_size" in fields or "multi_query_attention" in fields:
            return ChatGLM2Config
        if "inner_hidden_size" in fields or "position_encoding_2d" in fields:
            return ChatGLMConfig
        raise ChatGLMError(where, "padded_vocab_size / inner_hidden_size", "missing", "one of them")
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    raise ChatGLMError(where, "model_type", repr(model_type), "'chatglm', 'glm' or 'glm4'")


def parse_config(fields: dict[str, Any], where: Path | str = "config.json") -> ArchitectureConfig:
    """The typed configuration of the contents of a config.json. `where` is named in errors."""
    try:
        config = config_class(fields, where).model_validate(fields)
    except ValidationError as error:
        raise field_error(where, fields, error) from None
    config.check(where)
    return config


def read_config_json(folder: Path | str) -> dict[str, Any]:
    """The raw contents of `folder/config.json`."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        # A name as hubs have them: nothing is fetched here.
        is_file = Path(folder).exists()
        download = " (download it first)" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not is_file else ""
        seen = "a file" if is_file else "missing"
        raise ChatGLMError(folder, "folder", seen, f"a folder with config.json{download}")
    if not path.exists():
        raise ChatGLMError(folder, "config.json", "missing", "a file")
    return read_json_object(path)


def load_config(folder: Path | str) -> ArchitectureConfig:
    """The typed configuration of a checkpoint folder or of a converted folder."""
    return parse_config(read_config_json(folder), Path(folder) / "config.json")
