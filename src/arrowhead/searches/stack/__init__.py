"""Plans in step for the whole stack of blocks, found from one plain generation that is watched.

Where all blocks of a step are skipped, their changes add up: to extrapolate each block's output is to extrapolate the sum,
which is what the whole stack adds to its input. So that one tensor is watched, in every step of one generation. What an
extrapolation from earlier steps would change in the guided output is measured by the model's last layers alone. `watch` does
this and gives a `Profile`, from which `schedule` finds the plan for any budget.
"""
