"""Benchmarks: each checks the answer, then times ours, the baseline and the ceiling; also the demo model's training."""
