"""`monge-sam study`: does it help, and at what price?

To read in this order: `options`, `tasks`, `methods`, `training`, `statistics`, `report`, `plots`
and `run`.
"""
