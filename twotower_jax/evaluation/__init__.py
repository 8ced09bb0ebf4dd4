"""lm-evaluation-harness: the adapter, the eleven benchmarks of the paper, and the table beside its figures."""
