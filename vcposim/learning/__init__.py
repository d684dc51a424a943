"""Small asynchronous learners: tasks, lags, optimizers, step rules, and what collapse is."""
