"""Plans that skip all blocks of a step at once, found from one plain generation that is watched."""
