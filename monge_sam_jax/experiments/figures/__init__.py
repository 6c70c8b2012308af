"""`monge-sam figures`: figures 1 to 5 of the paper.

To read in this order: `options`, `trajectories` (figures 1, 2 and 5), `analysis` (3 and 4), `plots`
and `run`.
"""
