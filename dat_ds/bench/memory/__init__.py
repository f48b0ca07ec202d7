"""Memory of a training step, by rank: predicted without training, and measured."""
