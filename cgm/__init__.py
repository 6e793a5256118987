"""Conditional generators over cgkernels: models, training, sampling and measurement."""
