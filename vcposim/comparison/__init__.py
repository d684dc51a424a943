"""One estimator measured like every other: laws, exact moments, learning; and a leaderboard to be compared with."""
