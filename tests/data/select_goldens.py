"""Makes tests/data/golden from the full set of goldens: `python tests/data/select_goldens.py GOLDEN_FOLDER`.

Whole checkpoints of every architecture; of their outputs the short prompt, v1's mask cases, the padded batch and
the beams, with the first STEPS decode steps. Keys are those of the full set.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

STEPS = 8
KEPT = {
    "v1/v1_tiny": ("p5", "mask", "mid", "both", "both_tok", "batch", "p17_reppen"),
    "v2/v2_tiny": ("p5", "batch", "p17_reppen"),
    "glm4/glm4_chat": ("",),
}
# A left-padded prompt's logits of every position are large; its last row is the first decode step.
LEFT_OUT = ("_prefill_logits", "_final_k0", "_final_v0")


def _is_kept(key: str, prompts: tuple[str, ...]) -> bool:
    if not key.startswith(prompts):
        return False
    return not key.endswith(LEFT_OUT) or key.startswith("p5")


def main(golden: Path) -> None:
    here = Path(__file__).parent / "golden"
    for name, prompts in KEPT.items():
        source, target = golden / name, here / name
        shutil.rmtree(target, ignore_errors=True)
        (target / "checkpoint").mkdir(parents=True)
        for file in (source / "checkpoint").iterdir():
            shutil.copyfile(file, target / "checkpoint" / file.name)
        for chat in source.glob("chat.json"):
            shutil.copyfile(chat, target / chat.name)
        arrays = np.load(source / "golden.npz")
        kept = {key: arrays[key] for key in arrays if _is_kept(key, prompts)}
        for key in kept:
            if key.endswith("_dec_logits"):
                kept[key] = kept[key][:, :STEPS]
        for key in ("p17_input_ids", "p17_position_ids"):
            if key in arrays:
                kept[key] = arrays[key]
        np.savez_compressed(target / "golden.npz", **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
