"""Adversarial training inside other people's training loops."""
