"""Whole experiments: the demo, comparisons, throughput."""
