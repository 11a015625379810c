"""The workflow of each command, callable from Python: `from cmai_fast.workflows.evaluate import evaluate`.

One module per command, with a function of the command's name. Nothing is imported here, so that a command can refuse
bad input before PyTorch is loaded.
"""
