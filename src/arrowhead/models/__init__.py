"""Where attention sits in each family of models, and in which order their inputs come."""
