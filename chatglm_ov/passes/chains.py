"""Operations that follow one another as one, in a model that is about to be compiled.

OpenVINO asks each operation for its shapes at every call, which takes a thirtieth of a token's time on two cores and,
by count, a third on 64. A model from its embedding to its LM head becomes one `Chain` (csrc/ops/chain.h), which is
asked once, and holds the weights: each input would be one node more to ask with.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import openvino as ov

from chatglm_ov.lowering.operations import attributes_of, operation
from chatglm_ov.native import native

FIRST = ("Embedding", "EmbeddingRows")
"""What a chain can begin with, and hold nowhere else."""
CHAINED = (*FIRST, "FullyConnected", "MultiHeadAttention", "Norm", "LastRows")


@dataclass
class _Run:
    """Operations for one chain, in the order in which they run. behind: names of the others that need one of them."""

    members: list[ov.Node] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    behind: set[str] = field(default_factory=set)

    def takes(self, node: ov.Node) -> bool:
        """Whether `node` can run right behind the members: its rows are theirs, and nothing has to run between."""
        if node.get_type_name() not in CHAINED:
            return False
        sources = [value.get_node().get_name() for value in node.input_values()]
        return not self.members or (sources[0] in self.names and self.behind.isdisjoint(sources))

    def add(self, node: ov.Node) -> None:
        self.members.append(node)
        self.names.add(node.get_name())

    def pass_by(self, node: ov.Node) -> None:
        """`node` is not a member."""
        sources = {value.get_node().get_name() for value in node.input_values()}
        if not (self.names | self.behind).isdisjoint(sources):
            self.behind.add(node.get_name())


def chain_operations(model: ov.Model) -> None:
    """Change `model`, whose attention writes its caches in place, in place: what can run as one operation does."""
    run = _Run()
    for node in model.get_ordered_ops():
        if run.takes(node):
            run.add(node)
        elif node.get_type_name() in CHAINED:
            _replace(run.members)
            run = _Run()
            run.add(node)
        else:
            run.pass_by(node)
    _replace(run.members)


def _replace(members: list[ov.Node]) -> None:
    if len(members) < 2:
        return
    places = {node.get_name(): i for i, node in enumerate(members)}
    given = [value for node in members for value in node.input_values() if value.get_node().get_name() not in places]
    inputs = {_key(value): value for value in given if not _is_constant(value)}
    constants = {_key(value): value for value in given if _is_constant(value)}
    words = {key: str(i) for i, key in enumerate(inputs)} | {key: f"#{i}" for i, key in enumerate(constants)}
    words |= {(name, 0): f"@{i}" for name, i in places.items()}
    readers = [_readers_outside(node, places) for node in members]
    results = [i for i, targets in enumerate(readers) if targets]
    steps = [_step(node, words) for node in members]
    chain = operation("Chain", [*inputs.values(), *constants.values()], steps=steps, results=results)
    chain.set_friendly_name(f"{members[0].get_friendly_name()} to {members[-1].get_friendly_name()}")
    for output, i in enumerate(results):
        for target in readers[i]:
            target.replace_source_output(chain.output(output))


def _is_constant(value: ov.Output) -> bool:
    return value.get_node().get_type_name() == "Constant"


def _key(value: ov.Output) -> tuple[str, int]:
    return value.get_node().get_name(), value.get_index()


def _readers_outside(node: ov.Node, members: Container[str]) -> list[ov.Input]:
    return [target for target in node.output(0).get_target_inputs() if target.get_node().get_name() not in members]


def _step(node: ov.Node, words: dict[tuple[str, int], str]) -> str:
    """The line that csrc/ops/chain.h describes; `words` tells where a value comes from."""
    attributes = {**attributes_of(node), "packing_version": native().PACKING_VERSION}
    sources = [words[_key(value)] for value in node.input_values()]
    return " ".join([node.get_type_name(), *sources, *(f"{name}={value}" for name, value in attributes.items())])
