"""`monge-sam train`: several optimizers side by side on one task.

To read in this order: `options`, `data`, `models`, `training`, `checkpoints`, `outputs`, `report`,
`plots`, `agreement` (of the processes of a run), `comparison` (all optimizers from all seeds),
`distributed` (how a process ends when another is gone) and `run`.
"""
