"""What happens at which step: sparsity, decisions, phases and learning rates, all pure functions of the global step."""

from __future__ import annotations

from dataclasses import dataclass

SNAPSHOTS = 10


@dataclass(frozen=True)
class PruningSchedule:
    """Sparsity rises along a cubic from `start_step` to `end_step`, in `num_decisions` evenly spaced decisions.

    A `step` is the number of optimizer steps done: `decides_at(step)` says whether a decision follows step number `step`.
    """

    start_step: int
    end_step: int
    num_decisions: int
    target_sparsity: float

    @classmethod
    def from_fractions(cls, total: int, start: float, end: float, decisions: int, target: float) -> PruningSchedule:
        """From `start` and `end` as fractions of the `total` steps; there is at most one decision per step."""
        end_step = max(1, round(end * total))
        start_step = min(round(start * total), end_step - 1)
        return cls(start_step, end_step, min(decisions, end_step - start_step), target)

    @property
    def decision_steps(self) -> tuple[int, ...]:
        span = self.end_step - self.start_step
        return tuple(self.start_step + round(k * span / self.num_decisions) for k in range(1, self.num_decisions + 1))

    def decides_at(self, step: int) -> bool:
        return step in self.decision_steps

    def window_start(self, step: int) -> int:
        """The step after which the statistics begin that the decision after `step` reads: the previous decision or the start."""
        return max([s for s in self.decision_steps if s < step], default=self.start_step)

    def sparsity(self, step: int) -> float:
        """Cubic schedule (Zhu & Gupta, arXiv 1710.01878): s_T * (1 - (1 - (t - t0) / (t1 - t0))^3)."""
        progress = (step - self.start_step) / (self.end_step - self.start_step)
        return self.target_sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def records_after(self, step: int) -> bool:
        """Whether a decision will read statistics of the step that follows `step`."""
        return self.start_step <= step < self.end_step

    def averages_at(self, step: int, window: float) -> bool:
        """Whether the weights after `step` steps join the teacher's average.

        That is about `SNAPSHOTS` times, evenly spaced, in the last `window` (a fraction) of the steps up to the first decision.
        """
        first = self.decision_steps[0]
        every = max(1, round(window * first / SNAPSHOTS))
        return first * (1 - window) < step <= first and (first - step) % every == 0

    def teacher_factor(self, step: int, total_steps: int) -> float:
        """Factor on the teacher's weight: 1 at the first decision, when it was taken, falling linearly to 0 at the end.

        The teacher helps to recover from cuts, but it is a model of that early step: by the end the labels are the better guide.
        """
        first = self.decision_steps[0]
        return min(1.0, max(0.0, (total_steps - step) / max(1, total_steps - first)))

    def phase(self, step: int) -> str:
        """Name of the phase that the step after `step` belongs to."""
        if step < self.start_step:
            return "dense"
        return "prune" if step < self.end_step else "recover"


def default_learning_rate(hidden_size: int, *, is_full: bool) -> float:
    """Peak rate if the user names none: 1e-3 for a hidden size of 384 and less, 5e-4 for 768, about 1e-4 for 4096.

    Adam moves every weight by about the rate, so a layer's output moves in proportion to its width: wider models need smaller
    rates (Yang et al., arXiv 2203.03466). The constant was tuned on folds of training sets. Full fine-tuning gets a tenth.
    """
    rate = min(1e-3, 0.384 / hidden_size)
    return rate / 10 if is_full else rate


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up over `warmup_steps`, constant up to `decay_start`, then linear decay to zero at `total_steps`.

    The factor is the same for all parameter groups. The rate stays constant while the model still loses units, so that the
    remaining ones can adapt; with `decay_start` 0 the decay begins right after the warm-up.
    """

    warmup_steps: int
    total_steps: int
    decay_start: int = 0

    def factor(self, step: int) -> float:
        """Multiplier in [0, 1] for the step that follows `step` finished ones; above zero for the first step of a warm-up."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, self.decay_start)
        return min(1.0, max(0.0, (self.total_steps - step) / max(1, self.total_steps - start)))
