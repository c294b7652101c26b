"""Finds the plan of least predicted error for a budget, from a sensitivity table."""
