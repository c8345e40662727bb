from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from chatglm_ov import ChatGLMError

ERROR = ChatGLMError("config.json", "dtype", torch.float16, "float32")


def fail():
    raise ERROR


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_says_the_same(again):
    copied = again(ERROR)
    assert type(copied) is ChatGLMError
    assert str(copied) == str(ERROR) == "config.json: dtype is torch.float16, expected float32"
    assert (copied.where, copied.field) == (ERROR.where, ERROR.field)


def test_it_comes_out_of_another_process():
    with ProcessPoolExecutor(1) as pool, pytest.raises(ChatGLMError, match=r"dtype is torch\.float16"):
        pool.submit(fail).result(timeout=60)
