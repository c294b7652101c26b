"""Puts a plan on a model, runs it, and takes it off again."""
