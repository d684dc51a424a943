"""Rollouts dumped by a training framework: reading them, and what each estimator would have done with them."""
