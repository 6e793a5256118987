"""The model families: one file each; `cgm.model` lists them by name."""
