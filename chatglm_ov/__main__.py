"""`python -m chatglm_ov`: the command `chatglm-ov`."""

from __future__ import annotations

import sys

from chatglm_ov.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
