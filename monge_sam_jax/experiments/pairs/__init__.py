"""`monge-sam pairs`: pairs of pictures and captions for `monge-sam clip --data`, from packages.

To read in this order: `options`, `package` (what a reader gives), `openclipart` and `emoji` (the
readers), `pictures` (decoding and doubles), `report` and `run`.
"""
