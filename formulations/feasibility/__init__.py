"""Why budgets cannot be met, and what would be enough."""
