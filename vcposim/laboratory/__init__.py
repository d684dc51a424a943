"""Moments of an estimator on a problem: exactly (`exact`) where enumeration allows, else by draws (`monte_carlo`)."""
