"""Threads that share a model: one at a time, and none in the sequence of another."""

# ruff: noqa: F811 (a fixture is imported)

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import V2
from golden_sets import each_ops, open_model  # noqa: F401
from transformers import StoppingCriteria, StoppingCriteriaList

from chatglm_ov import ChatGLMError, OVChatGLMForCausalLM
from chatglm_ov.generation.stream import stream_tokens
from chatglm_ov.runtime.turns import Helper, Turns

pytestmark = pytest.mark.transformers_matrix

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
OTHER_IDS = torch.tensor([[11, 12, 13]])
SECONDS = 60


def greedy(model: Any, ids: torch.Tensor = IDS, count: int = 6, **options: Any) -> torch.Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=-1, **options)


def stream_of(model: Any, ids: torch.Tensor = IDS, count: int = 6, **options: Any) -> Any:
    return stream_tokens(model, ids, max_new_tokens=count, do_sample=False, eos_token_id=-1, **options)


@pytest.fixture
def model(open_model):
    return open_model(V2)


class Started(threading.Thread):
    """Runs at once; `result()` is what it has made, or raises what it has raised."""

    def __init__(self, use: Callable[[], Any]):
        super().__init__(daemon=True)
        self._use, self._made, self._error = use, None, None
        self.start()

    def run(self) -> None:
        try:
            self._made = self._use()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(SECONDS)
        assert not self.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._made


class Gate(StoppingCriteria):
    """Holds a generation after its third token: streams are given theirs a step or two later."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= IDS.shape[1] + 3:
            self.reached.set()
            assert self.open.wait(SECONDS)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @property
    def criteria(self) -> StoppingCriteriaList:
        return StoppingCriteriaList([self])


USES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "generate": greedy,
    "with what is in the cache": lambda model, ids: greedy(model, ids, reuse_cache=True),
    "forward": lambda model, ids: model(ids).logits,
    "copies": lambda model, ids: model(ids, prompt_copies=2).logits,
    "beams": lambda model, ids: greedy(model, ids, num_beams=2),
    "stream": lambda model, ids: torch.tensor(list(stream_of(model, ids))),
}


@pytest.mark.parametrize("use", USES)
@each_ops
def test_threads_that_call_again_and_again(use: str, ops: str, open_model):
    model, call = open_model(V2, ops), USES[use]
    wanted = [call(model, ids) for ids in (IDS, OTHER_IDS)]

    def work(mine: int) -> list[torch.Tensor]:
        return [call(model, (IDS, OTHER_IDS)[mine % 2]) for _ in range(15)]

    threads = [Started(lambda mine=mine: work(mine)) for mine in range(4)]
    for mine, thread in enumerate(threads):
        for result in thread.result():
            # A prompt that is in the cache in part is computed in other pieces.
            torch.testing.assert_close(result, wanted[mine % 2], rtol=0, atol=1e-4)


def test_a_generation_is_not_disturbed_between_its_steps(model):
    """What another one sets is not in force either."""
    wanted, threads, told = greedy(model), [], []

    class Meanwhile(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            threads.append(Started(lambda: greedy(model)))
            assert all(thread.is_alive() for thread in threads)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    progress = {"prompt_progress": lambda *at: told.append(at)}
    output = greedy(model, stopping_criteria=StoppingCriteriaList([Meanwhile()]), **progress)
    assert torch.equal(output, wanted) and len(threads) == 6
    assert all(torch.equal(thread.result(), wanted) for thread in threads)
    assert told == [(8, 8)] and model.prompt_progress is None


def test_a_turn_may_be_taken_within_a_turn(model):
    wanted = greedy(model)
    with model.session.request.turns.taken():
        other = Started(lambda: greedy(model))
        assert torch.equal(greedy(model), wanted)
        model.session.request.reset()
        assert other.is_alive()
    assert torch.equal(other.result(), wanted)


def test_who_waits_when_the_cache_is_released_waits_for_the_new_one(model):
    """And has it to itself then."""
    wanted, gate, inside = greedy(model), Gate(), Gate()
    first = Started(lambda: greedy(model, stopping_criteria=gate.criteria))
    assert gate.reached.wait(SECONDS)
    released = Started(model.release_cache)
    second = Started(lambda: greedy(model, stopping_criteria=inside.criteria))
    gate.open.set()
    assert torch.equal(first.result(), wanted) and inside.reached.wait(SECONDS)
    third = Started(lambda: greedy(model))
    third.join(0.2)
    assert third.is_alive()
    inside.open.set()
    assert torch.equal(second.result(), wanted) and torch.equal(third.result(), wanted)
    assert released.result() is None


def test_an_inner_turn_that_ends_late_leaves_no_user():
    """Ctrl-C can keep one alive beyond the outer one, until its traceback goes."""
    turns, taken = Turns(), []
    outer, inner = turns.taken(), turns.taken()
    for turn in (outer, inner):
        turn.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)

    class Asked(Helper):
        asked_by = threading.current_thread()

        def run(self) -> None:
            with turns.taken():
                taken.append(True)

    thread = Asked(daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert taken == [True]


def test_a_crop_that_waited_sees_the_sequence_that_is_there_then(model):
    cache = model(IDS).past_key_values
    with model.session.request.turns.taken():
        crop = Started(lambda: cache.crop(5))
        other = model(OTHER_IDS).past_key_values
    with pytest.raises(ChatGLMError, match="sequence is an earlier one"):
        crop.result()
    assert other.get_seq_length() == 3 and model.session.request.past_length == 3


def test_an_assistant_has_one_user_at_a_time(model):
    """Also where two models are each other's."""
    first, second = (OVChatGLMForCausalLM(model.config, model.compiled) for _ in range(2))
    wanted = greedy(model)
    pairs = [(first, model), (second, model), (model, first), (first, second)]
    threads = [
        Started(lambda pair=pair: [greedy(pair[0], assistant_model=pair[1]) for _ in range(5)]) for pair in pairs
    ]
    assert all(torch.equal(output, wanted) for thread in threads for output in thread.result())


# Streams


def test_the_main_thread_is_told_of_the_stream_that_it_has_left_open(model):
    """Other threads wait for its end."""
    wanted, gate = greedy(model), Gate()
    stream = stream_of(model, stopping_criteria=gate.criteria)
    assert next(stream) == wanted[0, 8]
    uses = (lambda: greedy(model), lambda: model(IDS), lambda: list(stream_of(model)), model.session.request.reset)
    for use in uses:
        with pytest.raises(ChatGLMError, match="model: use is by this thread already, expected the end of that first"):
            use()
    other = Started(lambda: greedy(model))
    gate.open.set()
    stream.close()
    assert torch.equal(other.result(), wanted) and torch.equal(greedy(model), wanted)


def test_a_thread_of_a_pool_may_read_and_call(model):
    """A server's threads read some tokens of a stream and serve another request in between."""
    wanted, gate = greedy(model), Gate()

    def read_and_call() -> tuple[list[int], torch.Tensor]:
        stream = stream_of(model, stopping_criteria=gate.criteria)
        first = next(stream)
        gate.open.set()
        between = greedy(model)
        return [first, *stream], between

    tokens, between = Started(read_and_call).result()
    assert tokens == wanted[0, 8:].tolist() and torch.equal(between, wanted)


def test_a_stream_for_the_generation_that_it_is_asked_in_is_refused(model):
    refused = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            with pytest.raises(ChatGLMError, match="use is by this thread already"):
                list(stream_of(model))
            refused.append(True)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"stopping_criteria": StoppingCriteriaList([Asks()])}
    assert torch.equal(Started(lambda: greedy(model, count=2, **options)).result(), greedy(model, count=2))
    assert len(refused) == 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer that interrupts")
def test_a_stream_that_waits_can_be_interrupted(model):
    gate = Gate()
    first = Started(lambda: greedy(model, stopping_criteria=gate.criteria))
    assert gate.reached.wait(SECONDS)

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(InterruptedError):
            next(stream_of(model))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert first.is_alive() and not any(isinstance(thread, Helper) for thread in threading.enumerate())
    gate.open.set()
    first.result()


def test_handles_of_a_stream_are_those_of_its_own_sequence(model):
    """Not of what another thread begins when it is over."""
    handles = []
    stream = stream_of(model, on_token=lambda: handles.append(model.session.latest()))
    list(stream)
    model(OTHER_IDS)
    assert len(handles) == 6
    with pytest.raises(ChatGLMError, match="sequence is an earlier one"):
        handles[-1].check_current()
