"""One generation that a search watches and changes step by step, of a pipeline or of a loop around a custom model."""
