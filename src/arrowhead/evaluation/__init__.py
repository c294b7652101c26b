"""Plans against the untouched pipeline: images, metrics and times, kept on disk and resumable."""
