"""Whether attention may write into the value of a state, and what to do where it may not.

The fused lowering assigns to a cache what it read of it, and attention writes into that value. The CPU plugin keeps
one buffer for such a state; nothing promises that it always will, so it is tried once a process. Elsewhere attention
gives the new cache as a second output, which costs a copy of the cache a token.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import openvino as ov
import openvino.opset15 as ops
from openvino.op.util import Variable, VariableInfo

from chatglm_ov.errors import ChatGLMError, last_line
from chatglm_ov.lowering.operations import attributes_of, operation
from chatglm_ov.runtime.kv_cache import BlockLayout

DIM = 16
LAYOUT = BlockLayout("f32", 1, DIM)

log = logging.getLogger(__name__)


@cache
def works_in_place() -> bool:
    """The answer for this process; a warning tells a "no". Raises ChatGLMError where it cannot be tried: that says
    nothing of any model, but of memory or threads that the process does not get."""
    try:
        fine = is_kept_in_place(trial_model())
    except RuntimeError as error:
        seen = f"a failure ({last_line(error)})"
        raise ChatGLMError("OpenVINO", "trial of a small model", seen, "memory and threads to run it") from error
    if not fine:
        log.warning("this OpenVINO copies the state of a model: the KV cache is copied for every token")
    return fine


def is_kept_in_place(model: ov.Model) -> bool:
    """Two inferences with one-token attention layers: the second sees the first's token, in the same buffer."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    (state,) = request.query_state()
    state.state = ov.Tensor(np.zeros((1, 1, 1, LAYOUT.block_bytes), np.uint8), shared_memory=True)
    rng, fed, places = np.random.default_rng(0), [], [state.state.data.ctypes.data]
    for slot in range(2):
        fed.append(rng.standard_normal((1, 1, 3 * DIM), np.float32))
        request.infer({"qkv": fed[-1], "slots": np.array([[slot]], np.int32)})
        places.append(state.state.data.ctypes.data)
    keys, values = LAYOUT.decode(state.state.data[0])
    kept = all(
        np.array_equal(stored[0, :2], np.stack([token[0, 0, start : start + DIM] for token in fed]))
        for stored, start in ((keys, DIM), (values, 2 * DIM))
    )
    return kept and len(set(places)) == 1


def trial_model() -> ov.Model:
    """One head of 16 dims, one block of slots; the position of both tokens is 0."""
    qkv = ops.parameter([1, 1, 3 * DIM], np.float32, name="qkv")
    slots = ops.parameter([-1, 1], np.int32, name="slots")
    for parameter in (qkv, slots):
        parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
    info = VariableInfo()
    info.data_shape = ov.PartialShape([-1, -1, -1, -1])
    info.data_type = ov.Type.u8
    info.variable_id = "cache"
    variable = Variable(info)
    length = ops.gather(ops.shape_of(slots), ops.constant(np.zeros(4, np.int64)), ops.constant(np.int64(0)))
    past = ops.read_value(ops.broadcast(np.uint8(0), ops.subtract(length, length)), variable)
    angle = [ops.constant(np.full((1, 1, DIM // 2), value, np.float32)) for value in (1, 0)]
    table = ops.constant(np.zeros((1, 1), np.int32))
    visible = ops.add(slots, np.int32(1))
    copied = ops.constant(np.array([-1], np.int32))
    attention = operation(
        "MultiHeadAttention",
        [qkv, *angle, table, slots, visible, copied, past],
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=DIM,
        in_place=1,
    )
    return ov.Model([ops.result(attention)], [ops.assign(past, variable)], [qkv, slots], "in_place")


def copy_caches(model: ov.Model) -> None:
    """Change `model` in place: attention gives the new cache, and that is what is assigned."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MultiHeadAttention":
            continue
        copying = operation("MultiHeadAttention", node.input_values(), **{**attributes_of(node), "in_place": 0})
        copying.set_friendly_name(node.get_friendly_name())
        state = node.input_value(node.get_input_size() - 1)
        for target in state.get_target_inputs():
            if target.get_node().get_type_name() == "Assign":
                target.replace_source_output(copying.output(1))
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(copying.output(0))
    model.validate_nodes_and_infer_types()
