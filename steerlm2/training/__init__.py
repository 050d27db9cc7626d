"""What only training has: steps, their batches and schedules, and a training run's surroundings."""

from steerlm2.training.schedules import warmup_cosine_hold

__all__ = ["warmup_cosine_hold"]
