"""`monge-sam quality`: what methods reach, against what they cost.

To read in this order: `options`, `tasks`, `training`, `report`, `plots` and `run`.
"""
