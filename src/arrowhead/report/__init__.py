"""One HTML page that compares the pictures of several plans."""
