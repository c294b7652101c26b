"""Stand-ins for transformers from their authors' own sources: the names of their modules and functions, and their calls."""
