"""Networks, one per file: parameters and a forward pass, no losses."""
