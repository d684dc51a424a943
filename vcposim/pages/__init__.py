"""Pages of one file: what the report of the experiments and the page of a replay share."""
