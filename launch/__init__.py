"""One file per verb: `deepseek-jax train` runs `main(argv)` of `train.py`; files with a leading _ are not verbs."""
