"""Keeps a run safe from step to step: stops it on request or when a loss is not finite, and saves checkpoints when due.

Ranks agree on all of this through `pulse`, for which nobody waits.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from prunadapt_ds import distributed, resume, watchdog
from prunadapt_ds.checkpoint import Checkpoint
from prunadapt_ds.errors import Interrupted, PrunadaptError
from prunadapt_ds.pulse import Pulse
from prunadapt_ds.session import Session
from prunadapt_ds.signals import StopSignals
from prunadapt_ds.step import StepLosses

LEAST_SECONDS_APART = 60.0
SHARE_OF_TIME = 0.01  # share of a run's time that saving may take by default


class Keeper:
    """Belongs to one session. Every public method is collective."""

    def __init__(self, session: Session, signals: StopSignals, start: Checkpoint | None = None):
        self.session, self.signals = session, signals
        self.pulse = Pulse(4, session.device)
        self.recent: deque[tuple[int, StepLosses]] = deque(maxlen=2)
        self.skipped: int | None = None  # a step that DeepSpeed left out, on all ranks alike
        self.stops = self.due = False
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.saved_step: int | None = session.step or None
        self.newest = start.folder if start else None

    def step_done(self, losses: StepLosses, *, settle: bool) -> None:
        """Report a finished optimizer step. The ranks read each other's flags one step later, or at once with `settle`.

        Raises PrunadaptError on all ranks if a loss or a gradient was not finite, or rank 0 could not write its metrics.
        """
        watchdog.beat()
        session = self.session
        self.recent.append((session.step, losses))
        self._hear()
        bad = torch.stack([~torch.isfinite(loss).all() for _, loss in losses]).any().float()
        if not session.engine.was_step_applied():  # DeepSpeed skips a step whose gradients are not finite, and goes on
            self.skipped, bad = session.step, torch.ones_like(bad)
        mine = [bool(self.signals.name), bool(session.tracker.problem), self._is_time()]
        self.pulse.send(
            torch.cat([bad[None], torch.tensor(mine, dtype=torch.float32).to(session.device, non_blocking=True)])
        )
        if settle:
            self._hear()

    def save_if_due(self) -> None:
        """Save at the end of a step, after its metrics are written. Raises Interrupted once a stop was requested."""
        session, every = self.session, self.session.config.output.checkpoint_steps
        is_last = session.step == session.total_steps
        due = session.step % every == 0 if every else self.due
        if due or is_last or self.stops:
            self._hear()  # a checkpoint of weights that are not finite would be worse than none
            self.save()
        self._leave_if_asked()

    def save(self) -> None:
        """Write a checkpoint, unless this step already has one."""
        session = self.session
        if self.saved_step == session.step:
            return
        start = time.monotonic()
        self.newest = resume.save(session)
        self.saved_step, self.due = session.step, False
        self.saved_at, self.save_seconds = time.monotonic(), time.monotonic() - start

    def stop_if_asked(self) -> None:
        """Raise Interrupted if a stop was requested. For the work after the last step, which has its checkpoint."""
        flags = [0.0, bool(self.signals.name), bool(self.session.tracker.problem), 0.0]
        self.pulse.send(torch.tensor(flags).to(self.session.device))
        self._hear()
        self._leave_if_asked()

    def _is_time(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; False on other ranks."""
        apart = max(LEAST_SECONDS_APART, self.save_seconds / SHARE_OF_TIME)
        return distributed.rank() == 0 and time.monotonic() - self.saved_at > apart

    def _hear(self) -> None:
        flags = self.pulse.read()
        if flags is None:
            return
        bad, stops, failed, due = (flag > 0 for flag in flags)
        self.stops, self.due = self.stops or stops, self.due or due
        if bad:
            raise self._no_number()
        if failed:
            raise PrunadaptError(distributed.broadcast_object(self.session.tracker.problem))

    def _no_number(self) -> PrunadaptError:
        """The error that names the first of the last two steps with a loss that is not finite on any rank, and its samples.

        If the losses are finite, their gradients were not.
        """
        step, samples = 0, []
        for recent, losses in self.recent:
            mine = [s for rows, loss in losses for s, x in zip(rows, loss.tolist(), strict=True) if x - x != 0]
            found = {s for of_rank in distributed.all_gather_objects(mine) for s in of_rank}
            if found:
                places = self.session.train_rows.places
                step, samples = recent, sorted(places[i] for i in found)
                break
        if not samples:
            return PrunadaptError(
                f"a gradient is not a finite number at step {self.skipped}, although the losses are; {self._where()}; "
                "try a smaller --learning_rate"
            )
        named = ", ".join(map(str, samples[:8])) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        return PrunadaptError(
            f"the loss is not a finite number at step {step}, on training samples {named} (counted from 0); "
            f"{self._where()}; try a smaller --learning_rate, or look at these samples"
        )

    def _where(self) -> str:
        return f"the last checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"

    def _leave_if_asked(self) -> None:
        if not self.stops:
            return
        name = next((name for name in distributed.all_gather_objects(self.signals.name) if name), "a signal")
        if self.session.config.prune.score_only:
            raise Interrupted(f"stopped by {name} while scoring; the same command starts again")
        again = "" if self.session.config.output.resume == "auto" else " with --resume auto"
        raise Interrupted(
            f"stopped by {name} after step {self.session.step} of {self.session.total_steps}; {self._where()}; "
            f"the same command{again} goes on from there"
        )
