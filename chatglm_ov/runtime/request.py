"""One sequence of calls into a compiled model. Letters as in `chatglm_ov.lowering`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import openvino as ov

from chatglm_ov.checkpoint.trained_prefix import TrainedPrefix
from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import architecture
from chatglm_ov.runtime.kv_cache import KVCache
from chatglm_ov.runtime.turns import Turns
from chatglm_ov.system.processors import THREADS


@dataclass
class Request:
    """One KV cache and the calls that continue it."""

    config: ArchitectureConfig
    infer_request: ov.InferRequest
    cache: KVCache
    trained_prefix: TrainedPrefix | None = None
    """Columns before every sequence, which nobody counts but the cache."""
    turns: Turns = field(default_factory=Turns)
    """Each call is a turn; for several in a row a thread takes it before."""

    def __post_init__(self) -> None:
        shapes = {port.any_name: port.partial_shape for port in self.infer_request.model_inputs}
        self._input_names = frozenset(shapes)
        self._position_rows = [rows.get_length() for rows in list(shapes["position_ids"])[1:-1]]
        self._open(self.infer_request)
        self._start_afresh()
        self._has_one_thread = threads_of(self.infer_request.get_compiled_model()) == 1

    def _open(self, infer_request: ov.InferRequest) -> None:
        self.infer_request = infer_request
        self._tensors = {name: infer_request.get_tensor(name) for name in self._input_names}

    def _begin_anew(self) -> None:
        """Go on in another infer request, whose cache is empty."""
        self._open(self.infer_request.get_compiled_model().create_infer_request())
        self.cache = self.cache.of(self.infer_request)
        self._start_afresh()

    @contextmanager
    def _whole_or_anew(self) -> Iterator[None]:
        """Whatever ends a change of the cache early, such as Ctrl-C, may leave layers of different lengths: a plugin
        writes behind the end of these, even after a reset."""
        try:
            yield
        except BaseException:
            self._begin_anew()
            raise

    def _start_afresh(self) -> None:
        # Attention mask [B, past] of the columns in the cache, and how many of them see each other in any order.
        self._fed = np.ones((0, 0), bool)
        self._prefix = 0

    @property
    def past_length(self) -> int:
        """Columns in the cache, padding included."""
        return self._fed.shape[1]

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return len(self._fed)

    @property
    def _trained(self) -> int:
        """Columns of the trained prefix."""
        return 0 if self.trained_prefix is None else self.trained_prefix.length

    def reset(self) -> None:
        """Forget the sequence; the next call starts a fresh one and may have another number of rows."""
        with self.turns.taken(), self._whole_or_anew():
            self.cache.forget()
            self._start_afresh()

    def truncate(self, past_length: int) -> None:
        """Go back to the first `past_length` columns of every row: the next call goes on from there.

        With fused operations nothing is copied, with stock ones what is left of the cache. Raises ChatGLMError for more
        columns than there are, and for a place inside the first generation's prefix, whose columns have seen each
        other.
        """
        with self.turns.taken():
            if not 0 <= past_length <= self.past_length:
                raise ChatGLMError("truncate", "past_length", past_length, f"0 to {self.past_length}")
            if 0 < past_length < self._prefix:
                raise ChatGLMError("truncate", "past_length", past_length, f"0, or {self._prefix} (the prefix) or more")
            if past_length == 0:
                self.reset()
                return
            with self._whole_or_anew():
                if past_length < self.past_length:
                    self.cache.truncate(self._trained + past_length)
                self._fed = self._fed[:, :past_length]

    def reserve(self, attention_mask: np.ndarray) -> None:
        """Make room for a sequence that will have the columns of `attention_mask` [B, T], those in the cache included:
        one that there is no memory for is refused before anything is computed, and the cache does not grow from call to
        call. Raises ChatGLMError; the cache is then as it was."""
        with self.turns.taken():
            slots = self._trained + int(np.count_nonzero(attention_mask, axis=1).max())
            self.cache.make_room(len(attention_mask), slots, keep=self.past_length > 0)

    def infer(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        beam_idx: np.ndarray,
        logits_to_keep: int = 0,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feed L more tokens; returns logits float32 [B, kept, V] of the last `logits_to_keep`, 0 meaning all L.

        input_ids int64 [B, L]; attention_mask int64 [B, past + L], 0 on padding, for columns in the cache as it was;
        position_ids int64 [B, L], or [B, 2, L] for ChatGLM-6B; beam_idx int32 [B], the cache row that each row
        continues, its own in the first call; prefix_length int64 [B] for ChatGLM-6B, whose columns before it must all
        be in one call. Raises ChatGLMError for ids out of the vocabulary, positions beyond the rotary table, a prefix
        in pieces and shapes that do not fit; the cache is then as it was.
        """
        inputs: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask, np.int64),
            "position_ids": np.ascontiguousarray(position_ids, np.int64),
            "beam_idx": np.ascontiguousarray(beam_idx, np.int32),
            # The graph has 32 bits for this and for a prefix: what is beyond them would be another number there.
            "logits_to_keep": np.array([min(logits_to_keep, np.size(input_ids))], np.int64),
        }
        if prefix_length is not None:
            inputs["prefix_length"] = np.maximum(np.ascontiguousarray(prefix_length, np.int64), 0)
        with self.turns.taken():
            return self._inferred(inputs)

    def _inferred(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Whatever ends a call early, such as Ctrl-C, may leave the states of some layers with what it fed: then the
        sequence is forgotten."""
        self._check_shapes(inputs)
        self._check_values(inputs)
        if self.past_length == 0 and not self.cache.takes(len(inputs["input_ids"])):
            self._begin_anew()
        mask, prefix = inputs["attention_mask"] != 0, inputs.get("prefix_length")
        inputs["attention_mask"] = mask
        continued = self._continued(inputs["beam_idx"])
        if self.trained_prefix is not None:
            continued = self._behind_the_prefix(inputs, continued)
        self.cache.prepare(inputs["attention_mask"] != 0, continued)
        try:
            self._write(inputs)
            self._execute()
            logits = self.infer_request.get_tensor("logits").data.copy()
            self._fed = mask
            self._prefix = 0 if prefix is None else int(prefix.max())
            return logits
        except BaseException:
            self.reset()
            raise

    def _execute(self) -> None:
        """With one thread OpenVINO's `infer` tells of no operation that failed, but would leave the last call's logits.
        Started and waited for, it does, which takes some 20 us more."""
        if self._has_one_thread:
            try:
                self.infer_request.start_async()
            finally:  # also where Ctrl-C comes in between
                self.infer_request.wait()
        else:
            self.infer_request.infer(share_outputs=True)

    def _write(self, inputs: dict[str, np.ndarray]) -> None:
        """Copies the inputs into the tensors that OpenVINO made for this request, as `infer` does with more ado. Not
        shared: the plugin keeps pointers to shared inputs, and a later request writes its own through them."""
        for name, values in inputs.items():
            tensor = self._tensors[name]
            # Asked for each time: another shape may have moved it. The shape of the view comes 40 times as fast as the
            # tensor's own.
            if tensor.data.shape != values.shape:
                tensor.shape = values.shape
            tensor.data[...] = values

    def check_positions(self, position_ids: np.ndarray) -> None:
        """Raise ChatGLMError for positions, of any shape, that the model does not have."""
        limit = self.config.position_limit
        _check_range("position_ids", position_ids, limit, "position", f" ({self.config.positions_field} {limit})")

    def _behind_the_prefix(self, inputs: dict[str, np.ndarray], continued: np.ndarray) -> np.ndarray:
        """Change what the model gets: all rows see the columns of the trained prefix before their own. Returns
        `continued` with them."""
        assert self.trained_prefix is not None
        length, rows = self.trained_prefix.length, len(continued)
        if self.past_length == 0:
            slots = length + int(np.count_nonzero(inputs["attention_mask"], axis=1).max())
            with self._whole_or_anew():
                self.cache.begin_with(self.trained_prefix.keys, self.trained_prefix.values, rows, slots)
            inputs["beam_idx"] = np.zeros(rows, np.int32)
        seen = np.ones((rows, length), np.int64)
        inputs["attention_mask"] = np.concatenate([seen, inputs["attention_mask"]], axis=1)
        if "prefix_length" in inputs:
            inputs["prefix_length"] = inputs["prefix_length"] + length
        return np.concatenate([seen != 0, continued], axis=1)

    def _continued(self, beam_idx: np.ndarray) -> np.ndarray:
        """Mask [B, past_length] of the columns that each row continues, as it was when they were fed."""
        return self._fed[beam_idx] if self.past_length else np.ones((len(beam_idx), 0), bool)

    def _check_shapes(self, inputs: dict[str, np.ndarray]) -> None:
        """An input that is left out would be the last call's, and an error inside the plugin spoils the compiled
        model for later calls: neither may come to that."""
        ids = inputs["input_ids"]
        if ids.ndim != 2 or ids.size == 0:
            raise ChatGLMError("infer", "input_ids", f"of shape {ids.shape}", "[B, L], at least one token")
        batch, new = ids.shape
        expected = {
            "attention_mask": [batch, self.past_length + new],
            "position_ids": [batch, *self._position_rows, new],
            "beam_idx": [batch],
            "prefix_length": [batch],
        }
        for name, shape in expected.items():
            if (name in inputs) != (name in self._input_names):
                seen, wanted = ("given", "none") if name in inputs else ("missing", shape)
                raise ChatGLMError("infer", name, seen, wanted)
            if name in inputs and list(inputs[name].shape) != shape:
                raise ChatGLMError("infer", name, f"of shape {list(inputs[name].shape)}", shape)

    def _check_values(self, inputs: dict[str, np.ndarray]) -> None:
        self.check_positions(inputs["position_ids"])
        rows = self.rows or len(inputs["beam_idx"])
        _check_range("input_ids", inputs["input_ids"], self.config.vocab_rows, "token id")
        _check_range("beam_idx", inputs["beam_idx"], rows, "row", " (rows in the cache)")
        _check_range("logits_to_keep", inputs["logits_to_keep"], None, "number")
        if "prefix_length" in inputs:
            self._check_prefix(inputs["prefix_length"], inputs["attention_mask"].shape[1])

    def _check_prefix(self, prefix_length: np.ndarray, columns: int) -> None:
        """Columns of a prefix that were fed before its last ones have not seen those."""
        for row, length in enumerate(prefix_length.tolist()):
            if self.past_length < length and (self.past_length > 0 or columns < length):
                wanted = f"at most {self.past_length or columns}: the columns before it are fed in one call"
                raise ChatGLMError("infer", f"prefix_length[{row}]", length, wanted)

    def cached(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of one layer, float32 [B, num_key_value_heads, past_length, head_dim] each, with the
        dims of a key head in the checkpoint's order. Of padding, with fused operations: zeros."""
        mask = np.concatenate([np.ones((self.rows, self._trained), bool), self._fed], axis=1)
        key, value = (part[:, :, self._trained :] for part in self.cache.read(layer, mask))
        order = architecture(self.config).key_order(self.config)
        restored = np.empty_like(key)
        restored[..., order] = key
        return restored, value


def threads_of(compiled: ov.CompiledModel) -> int | None:
    """Threads of an inference; None on a device that does not tell."""
    return compiled.get_property(THREADS) if THREADS in compiled.get_property("SUPPORTED_PROPERTIES") else None


def _check_range(name: str, values: np.ndarray, end: int | None, kind: str, why: str = "") -> None:
    # A single number is looked at by itself: in a step all are, and numpy's way to a maximum is long.
    if values.size == 1 and 0 <= values.item() < (np.inf if end is None else end):
        return
    # One pass: as an unsigned number a negative one is above all others.
    if values.view(f"u{values.itemsize}").max() < (1 << 8 * values.itemsize - 1 if end is None else end):
        return
    wrong = values[(values < 0) | (values >= (np.inf if end is None else end))][0]
    wanted = "0 or more" if end is None else f"0 to {end - 1}{why}"
    raise ChatGLMError("infer", name, f"a {kind} {wrong}", wanted)
