from __future__ import annotations

import copy
import pickle

import pytest
import torch

from chatglm_ov import ChatGLMError

ERROR = ChatGLMError("config.json", "dtype", torch.float16, "float32")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_says_the_same(again):
    copied = again(ERROR)
    assert type(copied) is ChatGLMError
    assert str(copied) == str(ERROR) == "config.json: dtype is torch.float16, expected float32"
    assert (copied.where, copied.field) == (ERROR.where, ERROR.field)
