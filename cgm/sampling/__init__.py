"""Loops that draw: token decoding, captured steps, patch scoring."""
