"""Sweeps: many commands on many models and machines, and their results as one table."""

from melens.sweeping.gathering import gather, kinds_of, read_sweep, results_of
from melens.sweeping.run import plan, sweep

__all__ = ["gather", "kinds_of", "plan", "read_sweep", "results_of", "sweep"]
