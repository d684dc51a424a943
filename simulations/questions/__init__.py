"""One experiment a file, one question an experiment: `python -m simulations list`."""
