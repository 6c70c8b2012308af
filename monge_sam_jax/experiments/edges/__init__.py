"""`monge-sam edges`: does sharpness settle where the theory has the edge of stability?

To read in this order: `options`, `training`, `report`, `plots` and `run`.
"""
