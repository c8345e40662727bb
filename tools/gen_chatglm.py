#!/usr/bin/env python
"""Convert a checkpoint of the ChatGLM family for OpenVINO, as `chatglm-ov convert` does.

python tools/gen_chatglm.py CHECKPOINT OUT [--weight-format bf16 int8 int4 f32 ...] [--ops fused|stock]
    [--lora FOLDER]
"""

import sys
from collections.abc import Sequence

from chatglm_ov.cli import convert
from chatglm_ov.cli.program import Parser, execute


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(prog="gen_chatglm.py", description=convert.SUMMARY, debug_default=False)
    convert.add_arguments(parser)
    return execute(parser, argv, convert.run)


if __name__ == "__main__":
    sys.exit(main())
