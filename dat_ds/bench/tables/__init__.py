"""Tables over many runs: cheaper steps, every method, robustness of what is cheaper."""
