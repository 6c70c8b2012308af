"""`monge-sam bench`: what a step costs with each method.

To read in this order: `options`, `models`, `steps` (the methods), `counts` (of compiled programs),
`measure`, `report`, `plots`, `targets` (accelerators that need not be there), `compile`
(for those) and `run`.
"""
