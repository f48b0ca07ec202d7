"""Judging a finished model: evaluation, self-checks, reports."""
