"""`monge-sam bad-minimum`: out of a bad global minimum, figure 6 of the paper.

To read in this order: `options`, `cifar10`, `data`, `training`, `claims` (of the paper, and whether
they hold), `report`, `plots` and `run`.
"""
