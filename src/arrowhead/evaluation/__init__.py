"""Plans against the untouched pipeline: images, metrics and times, stored on disk and resumable."""
