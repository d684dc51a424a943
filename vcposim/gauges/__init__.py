"""What a batch says about itself beyond the formulas: tail index with its threshold, and the panel of every gauge."""
