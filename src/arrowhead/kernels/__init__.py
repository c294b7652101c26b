"""Attention under a band. `dispatch` is the only door; `masks` says once what a band keeps."""
