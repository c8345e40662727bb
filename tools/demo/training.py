"""The training loop: AdamW, a constant rate with a cosine end, snapshots, loss curve."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import cos, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .batches import ConversationStream
from .model import ChatGLM3
from .vocabulary import IGNORED

WARMUP = 100
DECAY_SHARE = 0.3
FINAL_RATE = 0.02
WEIGHT_DECAY = 0.05
SMOOTHING = 0.98
OPENING_TOKENS, OPENING_WEIGHT, OPENING_START = 8, 8.0, 1600
SAVE_EVERY = 200
CHECK_EVERY = 500


@dataclass
class Plan:
    """What decides the result: the same plan, data, threads and machine type give the same weights."""

    size: str
    steps: int
    seed: int
    threads: int
    learning_rate: float
    bf16: bool

    @property
    def decay_start(self) -> int:
        return self.steps - round(DECAY_SHARE * self.steps)

    def decay(self, step: int) -> float:
        """0 in the constant part, which does not depend on `steps`; then rising to 1 at the end."""
        return max(0.0, (step - self.decay_start) / (self.steps - self.decay_start))

    def rate(self, step: int) -> float:
        """Linear warm-up, a constant part, then half a cosine down to FINAL_RATE of the peak."""
        fall = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + cos(pi * self.decay(step)))
        return self.learning_rate * min(1.0, (step + 1) / WARMUP) * fall


@dataclass
class History:
    """`checks` holds (step, poems right, held-out perplexity)."""

    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, int, float]] = field(default_factory=list)


def make_optimizer(model: ChatGLM3, plan: Plan) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def token_weights(labels: Tensor) -> Tensor:
    """Weight of each label [rows, length]: 0 for IGNORED, OPENING_WEIGHT for the first tokens of an answer, else 1.

    Once a poem is known by heart, all that is left to learn is which poem a title names, and that shows in its first
    few tokens only.
    """
    wanted = labels != IGNORED
    starts = wanted & ~F.pad(wanted[:, :-1], (1, 0))
    weights = wanted.float()
    for shift in range(min(OPENING_TOKENS, labels.shape[1])):
        weights[:, shift:][starts[:, : labels.shape[1] - shift]] *= OPENING_WEIGHT
    return weights


def answer_loss(model: ChatGLM3, ids: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the answer tokens, weighted or plain; the head is computed for their rows only."""
    wanted = labels != IGNORED
    logits = model.logits(model.hidden(ids)[wanted])
    if weights is None:
        return F.cross_entropy(logits.float(), labels[wanted])
    losses = F.cross_entropy(logits.float(), labels[wanted], reduction="none")
    return (losses * weights[wanted]).sum() / weights.sum()


class Trainer:
    def __init__(self, model: ChatGLM3, stream: ConversationStream, plan: Plan, snapshot: Path):
        self.model, self.stream, self.plan, self.snapshot = model, stream, plan, snapshot
        self.optimizer = make_optimizer(model, plan)
        self.history, self.step = History(), 0

    def save(self) -> None:
        """Write the snapshot beside its place and rename it: a killed run leaves the previous one whole."""
        self.snapshot.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state(),
            "losses": self.history.losses,
            "checks": self.history.checks,
        }
        torch.save(state, partial := self.snapshot.with_suffix(".partial"))
        partial.replace(self.snapshot)

    def resume(self) -> None:
        """Continue from the snapshot when there is one of the same plan.

        The number of steps may be another as long as the rate has not begun to fall: the run is then the same.
        """
        if not self.snapshot.exists():
            return
        state = torch.load(self.snapshot, weights_only=True)
        plan = Plan(**state["plan"])
        if state["step"] <= min(plan.decay_start, self.plan.decay_start):
            plan = replace(plan, steps=self.plan.steps)
        if plan != self.plan:
            raise SystemExit(f"{self.snapshot}: plan is {state['plan']}, expected {asdict(self.plan)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state(state["stream"])
        self.step, self.history = state["step"], History(state["losses"], state["checks"])

    def train_step(self) -> float:
        ids, labels = self.stream.next(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.plan.bf16):
            weights = token_weights(labels) if self.step >= OPENING_START else None
            loss = answer_loss(self.model, ids, labels, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def run(self, check: Callable[[ChatGLM3], tuple[int, float]]) -> None:
        """Train to the end of the plan; `check` gives (poems right, held-out perplexity) every CHECK_EVERY steps."""
        self.resume()
        smooth = None
        with tqdm(total=self.plan.steps, initial=self.step, unit="step", desc="training") as bar:
            while self.step < self.plan.steps:
                loss = self.train_step()
                self.history.losses.append(loss)
                smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
                bar.update()
                bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
                last = self.step == self.plan.steps
                if last or self.step % CHECK_EVERY == 0:
                    right, perplexity = check(self.model)
                    self.history.checks.append((self.step, right, perplexity))
                    bar.write(f"step {self.step}: loss {smooth:.3f}, {right} poems right, perplexity {perplexity:.1f}")
                if last or self.step % SAVE_EVERY == 0:
                    self.save()


def draw_curve(history: History, poems: int, path: Path) -> None:
    """Loss, recited poems and held-out perplexity over the steps, as a small picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(history.losses, linewidth=0.3, alpha=0.4)
    window = 50
    sums = torch.tensor([0.0, *history.losses]).cumsum(0)
    left.plot(range(window - 1, len(history.losses)), ((sums[window:] - sums[:-window]) / window).tolist())
    left.axvline(OPENING_START, color="grey", linewidth=0.5, linestyle=":")
    left.set(xlabel="step (openings weigh more from the dotted line on)", ylabel="training loss")
    steps, recited, perplexity = zip(*history.checks, strict=True)
    right.plot(steps, recited, "o-", markersize=3)
    right.set(xlabel="step", ylabel=f"poems recited, of {poems} (solid)")
    other = right.twinx()
    other.plot(steps, perplexity, "s--", color="tab:red", markersize=3)
    other.set(ylabel="held-out perplexity (dashed)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
