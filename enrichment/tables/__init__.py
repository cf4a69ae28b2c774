"""What the source tables are: `catalog.py` looks, `fit.py` judges, `guard.py` compares, `check.py` tells."""
