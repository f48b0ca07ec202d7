"""The min-max step: inner maximisation, outer forward, weights, metrics; torch only."""
