"""`monge-sam clip`: a small CLIP is fine-tuned, tables 1 to 3 and figure 7 of the paper.

To read in this order: `options`, `scenes` (generated pairs), `data`, `model`, `training`, `latents`
(what figure 7 shows), `report`, `plots` and `run`.
"""
