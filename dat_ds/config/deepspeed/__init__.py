"""DeepSpeed's part of a run config: what it accepts, and what we make of it."""
