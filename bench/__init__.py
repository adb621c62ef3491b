"""The microbenchmark: `python -m bench`, from a checkout."""
