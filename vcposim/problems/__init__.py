"""Small problems with known answers, and stale data from them: policies, environments, staleness, problem files."""
