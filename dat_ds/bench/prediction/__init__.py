"""Step times by a cost model, checked against measurements."""
