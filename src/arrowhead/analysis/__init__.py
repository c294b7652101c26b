"""What plans and attention look like: `measure` looks, `arrays` holds, `draw` and `draw_attention` alone use matplotlib.

`palette` says each method's colour once, for paper and terminal alike.
"""
