"""Explain why budgets cannot be met, and which larger budgets could be."""
