"""One page from the folders of runs: it holds all that it shows, and loads nothing."""
