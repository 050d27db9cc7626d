"""Training only: steps, their batches and schedules, and `TrainingRun`."""

from steerlm2.training.schedules import warmup_cosine_hold

__all__ = ["warmup_cosine_hold"]
