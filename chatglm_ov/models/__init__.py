"""Model definitions, one file per architecture.

Each module has

- `weight_shapes(config) -> dict[str, tuple[int, ...]]`: every stored tensor, by its name in the checkpoint;
- `stacked_weights(config) -> dict[str, tuple[str, ...]]`: weights that the graph reads as one, their rows one after
  another, by a name of their own;
- `is_ignored(config, name) -> bool`: stored tensors that the model does not read;
- `build(config, lowering) -> openvino.Model`: the graph, in the words of `chatglm_ov.lowering`;
- `EMBEDDING` and `LM_HEAD`: names of these two weights; a tied model stores no `LM_HEAD`;
- `key_order(config) -> numpy.ndarray`: where the dims of a key lie in the cache, by their place in the checkpoint's;
- `input_folds(config) -> dict[str, Fold]`: the linear weights whose inputs another weight can scale;
- `position_ids(config, input_ids, attention_mask)` and `prefix_length(config, input_ids, attention_mask)`:
  the position rules of the original's `prepare_inputs_for_generation`, in numpy.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from chatglm_ov.config import ArchitectureConfig


def architecture(config: ArchitectureConfig | type[ArchitectureConfig]) -> ModuleType:
    """The module that defines this configuration's model."""
    return import_module(f"chatglm_ov.models.{config.architecture}")


def lm_head_name(config: ArchitectureConfig) -> str:
    """Name of the weight that makes the logits: of the embedding in a tied model."""
    module = architecture(config)
    return str(module.EMBEDDING if config.tie_word_embeddings else module.LM_HEAD)


def graph_shapes(config: ArchitectureConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that the graph reads, by its names for them."""
    module = architecture(config)
    shapes = dict(module.weight_shapes(config))
    for name, names in module.stacked_weights(config).items():
        parts = [shapes.pop(part) for part in names]
        shapes[name] = (sum(part[0] for part in parts), *parts[0][1:])
    return shapes
