"""A fused folder's model in OpenVINO's own operations, for where the native library cannot be used.

The weights are unpacked to a temporary IR: the same numbers in the stock layout.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from chatglm_ov.config import ArchitectureConfig
from chatglm_ov.conversion.finished_folder import check_disk, folder_beside
from chatglm_ov.conversion.graph import write_graph
from chatglm_ov.errors import ChatGLMError
from chatglm_ov.models import graph_shapes
from chatglm_ov.system.sizes import size
from chatglm_ov.weights.file import WeightsFile
from chatglm_ov.weights.graph_file import GraphFile
from chatglm_ov.weights.ir import IR_NAME, UNPACKED, WEIGHTS_NAME
from chatglm_ov.weights.packed_weights import PackedWeights, UnpackedStore
from chatglm_ov.weights.store import Progress

_OTHER_BYTES = 8 << 20
"""Room for the graph and its small constants."""

log = logging.getLogger(__name__)


@contextmanager
def unpacked_ir(path: Path, config: ArchitectureConfig, weight_format: str, reason: str) -> Iterator[Path]:
    """A temporary IR of stock operations with the weights of `path`, an openvino_model.xml of fused ones. What is
    mapped of it stays when it is removed. reason: why the library cannot be used, for the warning.

    Raises ChatGLMError where the graph is damaged, or where there is no room for temporary files.
    """
    with PackedWeights(GraphFile(path)) as weights, _temporary_folder() as folder:
        weights.verify(graph_shapes(config))
        nbytes = sum(weights.nbytes(name) for name in weights.names)
        check_disk(folder / WEIGHTS_NAME, nbytes + _OTHER_BYTES, "temporary files: TMPDIR can name another disk")
        log.warning(
            "no fused operations (%s): %s of weights are unpacked for stock ones, at every load; "
            "convert --ops stock makes a folder of these",
            " ".join(reason.split()),
            size(nbytes),
        )
        with _progress_bar(nbytes) as report, WeightsFile(folder / WEIGHTS_NAME) as file:
            store = UnpackedStore(weights, file, weight_format, report)
            write_graph(config, store, "stock", {UNPACKED: 1})
        yield folder / IR_NAME


@contextmanager
def _progress_bar(nbytes: int) -> Iterator[Progress]:
    """In a terminal only, since nobody asked for it."""
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="unpack", disable=None) as bar:
        yield lambda _, done: bar.update(done)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """What Windows does not remove, since it is mapped, goes with the next one."""
    where = "temporary folder"
    try:
        where = tempfile.gettempdir()
        with folder_beside(Path(where) / "chatglm-ov-unpacked", 0o700) as folder:
            yield folder
    except OSError as error:
        seen = f"not writable ({error.strerror or error})"
        raise ChatGLMError(where, "temporary files", seen, "a disk with room: TMPDIR can name another") from error
