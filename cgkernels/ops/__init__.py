"""One file per op; the public functions are in `cgkernels` itself."""
