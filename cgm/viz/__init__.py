"""Images for people: grids, plots, sample pages."""
