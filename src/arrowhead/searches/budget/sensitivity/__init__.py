"""Measures how much each change of a site changes the final picture: the sensitivity table."""
