"""How good samples and models are."""
