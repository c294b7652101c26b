"""Quality metrics of images and features, and their intervals."""
