#!/usr/bin/env python
"""Pick the poems that int4 weights are calibrated with by default, from those that the demo model was trained on.

    python tools/make_calibration_text.py chatglm_ov/demo/calibration.jsonl.xz

None of them is in the anthology that the model knows by heart, and none is held out.
"""

import json
import lzma
import sys
from pathlib import Path

from demo.corpus import read_poems, training_poems

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EVERY = 75


def main() -> None:
    """Write every 75th poem, one JSON object a line."""
    poems = training_poems(read_poems(DATA / "tang_poems_train.jsonl.xz"), read_poems(DATA / "tang300.jsonl"))
    with lzma.open(sys.argv[1], "wt", encoding="utf-8", preset=9) as file:
        for poem in poems[::EVERY]:
            fields = {"title": poem.title, "author": poem.author, "text": poem.text}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
