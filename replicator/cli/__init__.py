"""The command line: a module for each group of commands. `main.py` is the list of all."""
