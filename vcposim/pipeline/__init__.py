"""Generation, training and weight sync as a discrete-event pipeline: throughput, realized lag, and how to plan them."""
