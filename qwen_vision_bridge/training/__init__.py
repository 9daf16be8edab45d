"""Train and calibrate bridges: data, frozen models, losses, trainer, checkpoints, validation."""
